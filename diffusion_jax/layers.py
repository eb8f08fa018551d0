"""The layers of the networks. cpu.py has faster versions for CPUs, with the same results (up to rounding) and parameters.

`matmul`, `conv3x3` and `normalize_and_activate` have `jax.jit`, so that JAX traces them once for each shape and not for each
layer.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, DTypeLike, Float, Int, Real

from diffusion_jax import cpu
from diffusion_jax.mlp import timestep_embedding


def sharded_by_xla(call: Callable) -> Callable:
    """Decorate a network's `__call__` to run under `auto_axes` on a mesh with explicit axes, so that XLA chooses the sharding.

    On such a mesh the network must not use random numbers, or variables other than its parameters.
    """

    @wraps(call)
    def wrapped(self, x_t, t, labels=None, s=None):
        sharding = jax.typeof(x_t).sharding
        if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
            return call(self, x_t, t, labels, s)
        if self.is_initializing():  # parameters depend on shapes alone
            return call(self, *jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (x_t, t, labels, s)))
        apply: Any = jax.sharding.auto_axes(self.clone(parent=None).apply, out_sharding=sharding)
        return apply(self.variables, x_t, t, labels, s)

    return wrapped


def embed_condition(
    t: Real[Array, " B"],
    labels: Int[Array, " B"] | None,
    s: Real[Array, " B"] | None,
    embed_dim: int,
    width: int,
    num_classes: int,
    dtype: DTypeLike,
) -> Float[Array, "B width"]:
    """silu(MLP(embedding of t) + embedding of the label). Adds its layers to the calling module.

    With a second time s, the MLP's hidden layer also takes the embedding of t - s, with weights that start at zero.

    The label `num_classes`, or `labels` = None, means unconditional. Any other label that is not a class gives NaN. Raises
    ValueError if there are labels but no classes, or not one label for each example.
    """
    if labels is not None and (num_classes == 0 or labels.shape != t.shape):
        raise ValueError(f"labels need num_classes and the shape {t.shape}, got {num_classes} and {labels.shape}")
    time = Dense(width, dtype, name="time_1")(timestep_embedding(t, embed_dim))
    if s is not None:
        interval = nn.Dense(width, use_bias=False, dtype=dtype, kernel_init=nn.initializers.zeros, name="interval")
        time = time + interval(timestep_embedding(t - s, embed_dim))
    time = Dense(width, dtype, name="time_2")(silu(time))
    if num_classes:
        labels = jnp.full(len(t), num_classes) if labels is None else labels
        labels = jnp.where(labels < 0, num_classes + 1, labels)  # a negative index would wrap around to a class
        time = time + nn.Embed(num_classes + 1, width, dtype, name="label")(labels)
    return silu(time)


class Dense(nn.Module):
    """A linear map of the last axis (a 1x1 convolution of an image), computed in `dtype`."""

    features: int
    dtype: DTypeLike
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... features"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        y = matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)


class Conv3x3(nn.Module):
    """A 3x3 convolution with stride 1, zero padding and no bias, computed in `dtype`."""

    features: int
    dtype: DTypeLike
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W features"]:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features), jnp.float32)
        return conv3x3(x.astype(self.dtype), kernel.astype(self.dtype))


class GroupNorm(nn.Module):
    """activation(group normalization of x, plus shift), with statistics in float32 and the result in `dtype` (Wu & He 2018).

    The number of groups is the largest of 8, 4 and 2 that gives equal groups of at least 4 channels, or else 1. `shift` is
    added to each example's bias.
    """

    dtype: DTypeLike
    activation: Callable[[Array], Array] = lambda x: x

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], shift: Float[Array, "#B #C"] | float = 0.0) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        offset = jnp.broadcast_to(bias[None] + jnp.asarray(shift, jnp.float32), (len(x), channels))
        groups = next(n for n in (8, 4, 2, 1) if n == 1 or (channels % n == 0 and channels >= 4 * n))

        return normalize_and_activate(x, scale[None, None, None], offset[:, None, None], groups, self.activation, self.dtype)


@partial(jax.jit, static_argnames=("groups", "activation", "dtype"), inline=True)
def normalize_and_activate(
    x: Float[Array, "B H W C"],
    scale: Float[Array, "1 1 1 C"],
    offset: Float[Array, "B 1 1 C"],
    groups: int,
    activation: Callable[[Array], Array],
    dtype: DTypeLike,
) -> Float[Array, "B H W C"]:
    """activation(group_norm(x, scale, offset, groups)), computed in float32. `activation` must be hashable."""

    def normalize(group_norm, x, scale, offset):
        return activation(group_norm(x.astype(jnp.float32), scale, offset, groups)).astype(dtype)

    # Save only the statistics: recomputing the rest in the backward pass moves less memory.
    keep = jax.checkpoint_policies.save_only_these_names("statistics")
    default = jax.checkpoint(partial(normalize, group_norm), policy=keep)
    return jax.lax.platform_dependent(x, scale, offset, cpu=partial(normalize, cpu.group_norm), default=default)


def group_norm(
    x: Float[Array, "B H W C"], scale: Float[Array, "1 1 1 C"], offset: Float[Array, "B 1 1 C"], groups: int
) -> Float[Array, "B H W C"]:
    """(x - mean) / deviation * scale + offset, with the mean and deviation of each group of channels.

    Both come from one pass over x, as moments about the mean of its first row. Because this row is part of the data, the loss
    of precision is at most a factor H, however large the mean.
    """
    batch, _, _, channels = x.shape
    origin = jax.lax.stop_gradient(x[:, :1].mean((1, 2), keepdims=True))  # the results do not depend on it
    first, second = (x - origin).mean((1, 2), keepdims=True), ((x - origin) ** 2).mean((1, 2), keepdims=True)

    def over_group(per_channel):
        return jnp.repeat(per_channel.reshape(batch, 1, 1, groups, channels // groups).mean(-1), channels // groups, -1)

    mean = over_group(origin + first)
    variance = over_group(jnp.maximum(second - first**2, 0) + (origin + first - mean) ** 2)
    mean, inverse = checkpoint_name((mean, 1 / jnp.sqrt(variance + 1e-6)), "statistics")
    return (x - mean) * (scale * inverse) + offset


@partial(jax.jit, inline=True)
def matmul(x: Float[Array, "... C"], kernel: Float[Array, "C D"]) -> Float[Array, "... D"]:
    """x @ kernel."""
    return jax.lax.platform_dependent(x, kernel, cpu=cpu.matmul, default=jnp.matmul)


@partial(jax.jit, inline=True)
def conv3x3(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """sum_ij x[h+i-1, w+j-1] kernel[i, j], with zero padding."""

    def on_cuda(x, kernel):
        return _convolution(x, _row_major_gradient(kernel))

    return jax.lax.platform_dependent(x, kernel, cpu=cpu.conv3x3, cuda=on_cuda, default=_convolution)


def _convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_jvp
def _row_major_gradient(kernel):
    """Return `kernel`, with a row-major gradient like the parameters: cuDNN's layout would spread to the optimizer state."""
    return kernel


@_row_major_gradient.defjvp
def _(primals, tangents):
    return *primals, with_layout_constraint(tangents[0], Layout((0, 1, 2, 3)))


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(x) (Elfwing et al. 2018), computed in float32 with tanh, which is faster on CPUs than exp and a division."""
    half = x.astype(jnp.promote_types(x.dtype, jnp.float32)) / 2
    return (half * (1 + jnp.tanh(half))).astype(x.dtype)
