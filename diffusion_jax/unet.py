"""The UNet of DDPM (Ho et al. 2020, app. B), sized for small images."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Real

from diffusion_jax.layers import Conv3x3, Dense, GroupNorm, silu
from diffusion_jax.mlp import timestep_embedding

MAX_HEADS = 8


class UNet(nn.Module):
    """f(x_t, t), an image of x_t's shape and float32; with `learned_variance`, a pair of that and a fraction for each element.

    Level i of `dim_scales` has two residual blocks on the way down and two on the way up, each with a skip between them, at
    1 / 2^i of the resolution; between levels the width becomes embed_dim * dim_scales[i]. Self-attention sits in the middle,
    and a long residual joins the first features to the last. `dtype` is what the layers compute in; parameters, normalization
    statistics and the output are float32. With `num_classes`, each example has a label from 0 on; num_classes itself, or no
    labels at all, stands for no class, and labels that are neither give NaN.

    Raises ValueError if x_t is no image, its height or width is not a multiple of 2^(len(dim_scales) - 1), there are labels
    without classes, or not one for each example.
    """

    in_dim: int
    embed_dim: int
    dim_scales: Sequence[int]
    dtype: DTypeLike = jnp.float32
    num_classes: int = 0
    learned_variance: bool = False

    @nn.compact
    def __call__(
        self, x_t: Float[Array, "B H W C"], t: Real[Array, " B"], labels: Int[Array, " B"] | None = None
    ) -> Float[Array, "B H W C"] | tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]]:
        sharding = jax.typeof(x_t).sharding
        if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
            if not self.is_initializing():  # let XLA shard what is inside
                apply: Any = jax.sharding.auto_axes(self.clone(parent=None).apply, out_sharding=sharding)
                return apply(self.variables, x_t, t, labels)
            x_t, t = jnp.zeros(x_t.shape, x_t.dtype), jnp.zeros(t.shape, t.dtype)  # parameters depend on shapes alone
            labels = None if labels is None else jnp.zeros(labels.shape, labels.dtype)

        block = lambda features, name: ResidualBlock(features, self.dtype, name=name)  # noqa: E731
        dense = lambda features, name: Dense(features, self.dtype, name=name)  # noqa: E731
        widths = [self.embed_dim, *(self.embed_dim * scale for scale in self.dim_scales)]
        levels = range(len(self.dim_scales))
        check_image(x_t.shape, len(levels) - 1)
        if labels is not None and (self.num_classes == 0 or labels.shape != t.shape):
            raise ValueError(f"labels need num_classes and the shape {t.shape}, got {self.num_classes} and {labels.shape}")

        time = timestep_embedding(t, self.embed_dim)
        time = dense(4 * self.embed_dim, "time_2")(silu(dense(4 * self.embed_dim, "time_1")(time)))
        if self.num_classes:
            labels = jnp.full(len(t), self.num_classes) if labels is None else labels
            labels = jnp.where(labels < 0, self.num_classes + 1, labels)  # which wrapped around would be a class
            time = time + nn.Embed(self.num_classes + 1, 4 * self.embed_dim, self.dtype, name="label")(labels)
        time = silu(time)
        x = first = dense(self.embed_dim, "stem")(x_t)

        skips = []
        for level in levels:
            for number in (1, 2):
                x = block(widths[level], f"down_{level}_block_{number}")(x, time)
                skips.append(x)
            if level < levels[-1]:
                x = nn.Conv(widths[level + 1], (3, 3), 2, padding=1, dtype=self.dtype, name=f"down_{level}")(x)
            else:
                x = dense(widths[level + 1], f"down_{level}")(x)

        x = block(widths[-1], "mid_block_1")(x, time)
        x = SelfAttention(self.dtype, name="mid_attention")(x)
        x = block(widths[-1], "mid_block_2")(x, time)

        for level in reversed(levels):
            for number in (1, 2):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(widths[level + 1], f"up_{level}_block_{number}")(x, time)
            x = pixel_shuffle(dense(4 * widths[level], f"up_{level}")(x)) if level > 0 else dense(widths[0], "up_0")(x)

        x = block(self.embed_dim, "out_block")(x + first, time)
        x = GroupNorm(jnp.float32, silu, name="out_norm")(x)
        outputs = 2 * self.in_dim if self.learned_variance else self.in_dim
        x = nn.Dense(outputs, kernel_init=nn.initializers.zeros, name="out")(x)
        return (x[..., : self.in_dim], (x[..., self.in_dim :] + 1) / 2) if self.learned_variance else x


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))) + shift(time))), starting as x: the last convolution starts at zero.

    The shift comes after the normalization, which would take it out again where a group is one channel.
    """

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], time: Float[Array, "B E"]) -> Float[Array, "B H W features"]:
        h = GroupNorm(self.dtype, silu, name="norm_1")(x)
        h = Conv3x3(self.features, self.dtype, name="conv_1")(h)
        shift = Dense(self.features, self.dtype, name="shift")(time)
        h = GroupNorm(self.dtype, silu, name="norm_2")(h, shift)
        h = Conv3x3(self.features, self.dtype, nn.initializers.zeros, name="conv_2")(h)
        if x.shape[-1] != self.features:
            x = Dense(self.features, self.dtype, use_bias=False, name="shortcut")(x)
        return x + h


class SelfAttention(nn.Module):
    """x + attention(norm(x)) among all pixels, scaled by 1 / sqrt(head_dim) (Vaswani et al. 2017, eq. 1)."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        batch, height, width, channels = x.shape
        heads = math.gcd(MAX_HEADS, channels)
        h = GroupNorm(self.dtype, name="norm")(x).reshape(batch, height * width, channels)
        # In float32, since jax 0.12.0 aborts on bfloat16 attention on a CPU.
        qkv = nn.DenseGeneral((3, heads, channels // heads), dtype=self.dtype, name="qkv")(h).astype(jnp.float32)
        h = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        h = Dense(channels, self.dtype, name="out")(h.reshape(x.shape))
        return x + h


def pixel_shuffle(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C//4"]:
    """Twice the height and width from a quarter of the channels; after a 1x1 layer, a 2x2 transposed convolution."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def check_image(shape: Sequence[int], halvings: int) -> None:
    """Raise ValueError unless `shape` is that of images whose height and width can be halved so many times."""
    if len(shape) != 4:
        raise ValueError(f"the UNet takes images of the shape [B, H, W, C], got {shape}")
    if any(n % 2**halvings for n in shape[1:3]):
        raise ValueError(f"the UNet needs height and width to be multiples of {2**halvings}, got {shape[1]}x{shape[2]}")
