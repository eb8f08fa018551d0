"""The diffusion transformer, DiT (Peebles & Xie 2023), on patches of small images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Real

from diffusion_jax.layers import Dense, embed_condition, sharded_by_xla
from diffusion_jax.unet import check_image, pixel_shuffle, to_patches

HEAD_DIM = 64


class DiT(nn.Module):
    """f(x_t, t), a float32 image of x_t's shape; with `learned_variance`, a pair (image, fraction), both of that shape.

    Tokens are patches of `patch_size` x `patch_size` pixels, embedded in `embed_dim` channels with a learned position; `depth`
    blocks follow. Layers compute in `dtype`; parameters, statistics and the output are float32. With `num_classes`, an example
    may have a label. It may also have a second time s (see `embed_condition`). The parameters fit images of one size.

    Raises ValueError if `depth` or `patch_size` is less than 1, x_t is not [B, H, W, C], or its height or width is not a
    multiple of `patch_size`.
    """

    in_dim: int
    embed_dim: int
    depth: int
    patch_size: int
    dtype: DTypeLike = jnp.float32
    num_classes: int = 0
    learned_variance: bool = False

    @nn.compact
    @sharded_by_xla
    def __call__(
        self,
        x_t: Float[Array, "B H W C"],
        t: Real[Array, " B"],
        labels: Int[Array, " B"] | None = None,
        s: Real[Array, " B"] | None = None,
    ) -> Float[Array, "B H W C"] | tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]]:
        if self.depth < 1 or self.patch_size < 1:
            raise ValueError(f"depth and patch_size must be at least 1, got {self.depth} and {self.patch_size}")
        check_image(x_t.shape, self.patch_size)
        condition = embed_condition(t, labels, s, self.embed_dim, self.embed_dim, self.num_classes, self.dtype)
        x = Dense(self.embed_dim, self.dtype, name="stem")(to_patches(x_t, self.patch_size))
        grid = x.shape[1:3]
        x = x.reshape(len(x), -1, self.embed_dim)
        position = self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]), jnp.float32)
        x = x + position.astype(self.dtype)
        for number in range(self.depth):
            x = Block(self.dtype, name=f"block_{number + 1}")(x, condition)

        shift, scale = modulation(condition, 2, self.embed_dim, jnp.float32)
        outputs = 2 * self.in_dim if self.learned_variance else self.in_dim
        x = nn.Dense(self.patch_size**2 * outputs, kernel_init=nn.initializers.zeros, name="out")(normalize(x, shift, scale))
        x = pixel_shuffle(x.reshape(len(x), *grid, -1), self.patch_size)
        return (x[..., : self.in_dim], (x[..., self.in_dim :] + 1) / 2) if self.learned_variance else x


class Block(nn.Module):
    """h + gate_2 MLP(norm(h)) with h = x + gate_1 attention(norm(x)), modulated by the condition (adaLN-Zero, fig. 3).

    The gates start at zero, so the block starts as the identity. Heads have 64 channels, or the next larger divisor of C, or C
    if C < 64. Queries and keys are normalized (Dehghani et al. 2023). Attention is computed in float32.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], condition: Float[Array, "B E"]) -> Float[Array, "B N C"]:
        batch, tokens, channels = x.shape
        heads = next(count for count in range(max(1, channels // HEAD_DIM), 0, -1) if channels % count == 0)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation(condition, 6, channels, self.dtype)
        h = Dense(3 * channels, self.dtype, name="qkv")(normalize(x, shift_1, scale_1))
        q, k, v = jnp.moveaxis(h.reshape(batch, tokens, 3, heads, channels // heads).astype(jnp.float32), 2, 0)
        h = jax.nn.dot_product_attention(nn.RMSNorm(name="q_norm")(q), nn.RMSNorm(name="k_norm")(k), v)
        x = x + gate_1 * Dense(channels, self.dtype, name="out")(h.reshape(x.shape))
        h = nn.gelu(Dense(4 * channels, self.dtype, name="mlp_1")(normalize(x, shift_2, scale_2)))
        return x + gate_2 * Dense(channels, self.dtype, name="mlp_2")(h)


def modulation(condition: Float[Array, "B E"], count: int, channels: int, dtype: DTypeLike) -> list[Float[Array, "B 1 C"]]:
    """`count` vectors for each example, linear in `condition`, initially zero. Adds its layer to the calling module."""
    layer = nn.Dense(count * channels, dtype=dtype, kernel_init=nn.initializers.zeros, name="modulation")
    return jnp.split(layer(condition)[:, None], count, -1)


def normalize(x: Float[Array, "B N C"], shift: Float[Array, "B 1 C"], scale: Float[Array, "B 1 C"]) -> Float[Array, "B N C"]:
    """(x - mean) / deviation * (1 + scale) + shift over the channels, in the dtype of `scale`, with statistics in float32."""
    return nn.LayerNorm(use_bias=False, use_scale=False, use_fast_variance=False, dtype=scale.dtype)(x) * (1 + scale) + shift
