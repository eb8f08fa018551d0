"""MeanFlow [Geng et al. 2025]: a network of two times, t and s, that steps from t to any earlier s in one call.

On rectified flow, x_t = (1 - t/T) x_0 + (t/T) eps has the velocity T dx_t/dt = eps - x_0. Let v be its mean given x_t. The
network predicts the average of v along the flow between s and t,

    u(x_t, t, s) = 1 / (t - s) integral_s^t v(x_r, r) dr,   x_s = x_t - (t - s) / T u(x_t, t, s)      (19)

which is v itself for s = t. Differentiating (t - s) u with respect to t along the flow gives the identity for training:

    u = v - (t - s) du/dt,   du/dt = v / T grad_x u + partial_t u                                     (20)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from diffusion_jax.diffusion import Predict, as_column, check_shape, q_sample
from diffusion_jax.sampling import SamplerTable, Steps, as_times, make_table
from diffusion_jax.schedules import NoiseSchedule, flow_schedule

Network = Callable[[Array, Array, Array], Array]
"""network(x_t, t, s) -> u of eq. 19, of x_t's shape, for 0 <= s <= t <= T."""
SMALL = 1e-3


def mean_flow_loss(
    num_timesteps: int,
    network: Network,
    x_0: Float[Array, "B *shape"],
    t: Real[Array, " B"],
    s: Real[Array, " B"],
    eps: Float[Array, "B *shape"],
    velocity: Callable[[Array, Array, Array], Array] | None = None,
    power: float = 1.0,
) -> Float[Array, "B *shape"]:
    """The squared distance between u(x_t, t, s) and the right side of eq. 20, which is held constant. Unreduced.

    `adaptively_weighted` weights its gradient. The velocity v is eps - x_0, or what `velocity(x_t, t, eps - x_0)` returns
    if given: for example the velocity of a trained flow, to distill it, or one with guidance.
    Raises ValueError unless eps and the prediction have x_0's shape.
    """
    t, s = (time.astype(jnp.promote_types(x_0.dtype, jnp.float32)) for time in (t, s))
    x_t, v = q_sample(flow_schedule(num_timesteps), x_0, t, eps), eps - x_0
    if velocity is not None:
        v = velocity(x_t, t, v)
    along = (v / num_timesteps).astype(x_t.dtype)
    u, du_dt = jax.jvp(network, (x_t, t, s), (along, jnp.ones_like(t), jnp.zeros_like(s)))
    check_shape("prediction", u, x_0)
    target = v - as_column(t - s, x_0.ndim) * du_dt
    return adaptively_weighted((u - jax.lax.stop_gradient(target)) ** 2, power)


def adaptively_weighted(squared: Float[Array, "B *shape"], power: float = 1.0) -> Float[Array, "B *shape"]:
    """Return `squared`, with the gradient of each example times 1 / (its mean + 1e-3)^power [Geng et al. 2025, sec. 4.3]."""
    weight = (squared.mean(tuple(range(1, squared.ndim)), keepdims=True) + SMALL) ** -power
    weighted = jax.lax.stop_gradient(weight) * squared
    return weighted + jax.lax.stop_gradient(squared - weighted)


def guided_velocity(network: Network, scale: float) -> Callable[[Array, Array, Array], Array]:
    """velocity(x_t, t, v) = scale v + (1 - scale) u(x_t, t, t), for `mean_flow_loss` [Geng et al. 2025, eq. 19].

    `network` is the network in training, called without the class. Samples then have guidance without extra network calls.
    """
    return lambda x_t, t, v: scale * v + (1 - scale) * network(x_t, t, t)


def jumping(network: Network, table: SamplerTable) -> Predict:
    """predict(x_t, t) = u(x_t, t, s) with the target "pred_u", where the row of `table` at t leads to s.

    The table is `ddim_table` with eta = 0 or `consistency_table`, on rectified flow. There s = a t: DDIM takes eq. 19 from each
    time to the next, and a consistency step has a = 0, so it predicts the data. At other times than the table's the result is
    NaN. Do not clip x_0_hat, which is an image only if s = 0.
    """

    def predict(x_t: Float[Array, "B *shape"], t: Real[Array, " B"]) -> Any:
        at, a = (jnp.asarray(column, jnp.float32)[None] for column in (table.t, table.a))
        here = at == t[:, None]
        share = jnp.where(here.any(axis=1), jnp.where(here, a, 0.0).max(axis=1), jnp.nan)
        return network(x_t, t, share * t)

    return predict


def consistency_table(schedule: NoiseSchedule, sampling_timesteps: Steps = None) -> SamplerTable:
    """Predict the data, then noise it again: x_s = signal_s x_0_hat + noise_s z [Song et al. 2023, alg. 1].

    Raises ValueError on steps outside 1..T.
    """
    times = as_times(schedule, sampling_timesteps)
    signal, noise = schedule.at(times[1:])
    return make_table(schedule, times[:-1], np.zeros(len(signal)), signal, noise)
