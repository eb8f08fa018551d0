"""The UNet of DDPM (Ho et al. 2020, app. B), sized for small images."""

import math
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Real

from diffusion_jax.layers import Conv3x3, Dense, GroupNorm, embed_condition, sharded_by_xla, silu

MAX_HEADS = 8


class UNet(nn.Module):
    """f(x_t, t), a float32 image of x_t's shape with `in_dim` channels; with `learned_variance`, a pair (image, fraction).

    Level i of `dim_scales`, at 1 / 2^i of the resolution, has two residual blocks on the way down and two on the way up, with
    skip connections between them. After its blocks on the way down, the width becomes embed_dim * dim_scales[i]. The middle has
    self-attention, and a residual connection adds the first features to the last. The network sees patches of `patch_size` x
    `patch_size` pixels as channels. Layers compute in `dtype`; parameters, normalization statistics and the output are float32.
    With `num_classes`, each example may have a label. It may also have a second time s (see `embed_condition`).

    Raises ValueError if `patch_size` is less than 1, x_t is not [B, H, W, C], or its height or width is not a multiple of
    patch_size * 2^(len(dim_scales) - 1).
    """

    in_dim: int
    embed_dim: int
    dim_scales: Sequence[int]
    dtype: DTypeLike = jnp.float32
    num_classes: int = 0
    learned_variance: bool = False
    patch_size: int = 1

    @nn.compact
    @sharded_by_xla
    def __call__(
        self,
        x_t: Float[Array, "B H W C"],
        t: Real[Array, " B"],
        labels: Int[Array, " B"] | None = None,
        s: Real[Array, " B"] | None = None,
    ) -> Float[Array, "B H W C"] | tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]]:
        block, dense = partial(ResidualBlock, dtype=self.dtype), partial(Dense, dtype=self.dtype)
        widths = [self.embed_dim, *(self.embed_dim * scale for scale in self.dim_scales)]
        levels = range(len(self.dim_scales))
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {self.patch_size}")
        check_image(x_t.shape, self.patch_size * 2 ** (len(levels) - 1))
        time = embed_condition(t, labels, s, self.embed_dim, 4 * self.embed_dim, self.num_classes, self.dtype)
        x = first = dense(self.embed_dim, name="stem")(to_patches(x_t, self.patch_size))

        skips = []
        for level in levels:
            for number in (1, 2):
                x = block(widths[level], name=f"down_{level}_block_{number}")(x, time)
                skips.append(x)
            if level < levels[-1]:
                x = nn.Conv(widths[level + 1], (3, 3), 2, padding=1, dtype=self.dtype, name=f"down_{level}")(x)
            else:
                x = dense(widths[level + 1], name=f"down_{level}")(x)

        x = block(widths[-1], name="mid_block_1")(x, time)
        x = SelfAttention(self.dtype, name="mid_attention")(x)
        x = block(widths[-1], name="mid_block_2")(x, time)

        for level in reversed(levels):
            for number in (1, 2):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(widths[level + 1], name=f"up_{level}_block_{number}")(x, time)
            x = dense(4 * widths[level] if level > 0 else widths[0], name=f"up_{level}")(x)
            x = pixel_shuffle(x) if level > 0 else x

        x = block(self.embed_dim, name="out_block")(x + first, time)
        x = GroupNorm(jnp.float32, silu, name="out_norm")(x)
        outputs = 2 * self.in_dim if self.learned_variance else self.in_dim
        x = nn.Dense(self.patch_size**2 * outputs, kernel_init=nn.initializers.zeros, name="out")(x)
        x = pixel_shuffle(x, self.patch_size)
        return (x[..., : self.in_dim], (x[..., self.in_dim :] + 1) / 2) if self.learned_variance else x


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))) + shift(time))). The last convolution starts at zero.

    The shift follows the normalization, which would subtract its mean over each group.
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
    """x + attention(norm(x)) over all pixels, scaled by 1 / sqrt(head_dim) (Vaswani et al. 2017, eq. 1)."""

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


def pixel_shuffle(x: Float[Array, "B H W C"], size: int = 2) -> Float[Array, "B H*{size} W*{size} C//{size}**2"]:
    """Turn each pixel's channels into `size` x `size` pixels. After a 1x1 layer, this is a transposed convolution."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, size, size, channels // size**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, size * height, size * width, channels // size**2)


def to_patches(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B H//{size} W//{size} C*{size}**2"]:
    """Turn the `size` x `size` pixels of each patch into channels: the inverse of `pixel_shuffle`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // size, width // size, size**2 * channels)


def check_image(shape: Sequence[int], multiple: int) -> None:
    """Raise ValueError unless `shape` is [B, H, W, C], with H and W multiples of `multiple`."""
    if len(shape) != 4:
        raise ValueError(f"the network takes images of the shape [B, H, W, C], got {shape}")
    if any(n % multiple for n in shape[1:3]):
        raise ValueError(f"the network needs height and width to be multiples of {multiple}, got {shape[1]}x{shape[2]}")
