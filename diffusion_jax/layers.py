"""The layers of the UNet. What a CPU needs to run them fast is in cpu.py, with the same results and parameters."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float

from diffusion_jax import cpu


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
    """A 3x3 convolution of stride 1 with zeros beyond the edge and no bias, computed in `dtype`."""

    features: int
    dtype: DTypeLike
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W features"]:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features), jnp.float32)
        return conv3x3(x.astype(self.dtype), kernel.astype(self.dtype))


class GroupNorm(nn.Module):
    """activation(group normalization + shift), with statistics in float32 and the result in `dtype` (Wu & He 2018).

    There are up to 8 groups, of 4 channels or more. `shift` is added to the bias of each example.
    """

    dtype: DTypeLike
    activation: Callable[[Array], Array] = lambda x: x

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], shift: Float[Array, "#B #C"] | float = 0.0) -> Float[Array, "B H W C"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        offset = jnp.broadcast_to(bias[None] + jnp.asarray(shift, jnp.float32), (len(x), x.shape[-1]))

        groups = next(n for n in (8, 4, 2, 1) if n == 1 or (x.shape[-1] % n == 0 and x.shape[-1] >= 4 * n))

        def normalize(group_norm, x, scale, offset):
            return self.activation(group_norm(x.astype(jnp.float32), scale, offset, groups)).astype(self.dtype)

        return jax.lax.platform_dependent(
            x, scale[None, None, None], offset[:, None, None],
            cpu=partial(normalize, cpu.group_norm),
            default=jax.checkpoint(
                partial(normalize, group_norm), policy=jax.checkpoint_policies.save_only_these_names("statistics"),
                prevent_cse=__import__("os").environ.get("CSE", "1") == "1",
            ),  # x is kept, the rest recomputed: less memory to move
        )  # fmt: skip


def group_norm(
    x: Float[Array, "B H W C"], scale: Float[Array, "1 1 1 C"], offset: Float[Array, "B 1 1 C"], groups: int
) -> Float[Array, "B H W C"]:
    mean = checkpoint_name(cpu.mean_of_groups(x, groups), "statistics")
    inverse = checkpoint_name(1 / jnp.sqrt(cpu.mean_of_groups((x - mean) ** 2, groups) + 1e-6), "statistics")
    slope = scale * inverse
    return x * slope + (offset - mean * slope)


def matmul(x: Float[Array, "... C"], kernel: Float[Array, "C D"]) -> Float[Array, "... D"]:
    """x @ kernel."""
    return jax.lax.platform_dependent(x, kernel, cpu=cpu.matmul, default=jnp.matmul)


def conv3x3(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """sum_ij x[h+i-1, w+j-1] kernel[i, j], with zeros beyond the edge."""
    return jax.lax.platform_dependent(x, kernel, cpu=cpu.conv3x3, default=cpu._convolution)


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(x) (Elfwing et al. 2018), by way of tanh, which costs a CPU half of exp and a division; in float32 inside."""
    half = x.astype(jnp.promote_types(x.dtype, jnp.float32)) / 2
    return (half * (1 + jnp.tanh(half))).astype(x.dtype)
