"""The timestep embedding, and a small network for vectors."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Real


def timestep_embedding(t: Real[Array, "B"], dim: int, max_period: float = 10_000.0) -> Float[Array, "B dim"]:
    """Sines and cosines of t at dim / 2 frequencies from 1 down to 1 / max_period (Vaswani et al. 2017, sec. 3.5).

    Raises ValueError if `dim` is odd or less than 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"the timestep embedding needs an even embed_dim of at least 4, got {dim}")
    half = dim // 2
    frequencies = max_period ** -(jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class MLP(nn.Module):
    """f(x_t, t) for vectors: a linear layer plus the time embedding, `num_layers` ReLU layers and a linear output layer."""

    in_dim: int
    embed_dim: int
    num_layers: int = 5

    @nn.compact
    def __call__(self, x_t: Float[Array, "B in_dim"], t: Real[Array, "B"]) -> Float[Array, "B in_dim"]:
        h = nn.Dense(self.embed_dim)(x_t) + timestep_embedding(t, self.embed_dim)
        for _ in range(self.num_layers):
            h = nn.relu(nn.Dense(self.embed_dim)(h))
        return nn.Dense(self.in_dim)(h)
