"""Flow maps: networks of two times, t and s, that step from t to any earlier s in one call.

Such a network predicts the x_0_hat whose DDIM step ends where the flow through x_t is at s, or another target in its place:

    x_s = a x_t + b x_0_hat(x_t, t, s),   a = noise_s / noise_t,   b = signal_s - a signal_t          (19)

`jump_target` computes this x_0_hat from two points of a trained network's flow. MeanFlow [Geng et al. 2025] needs only data,
on rectified flow, x_t = (1 - t/T) x_0 + (t/T) eps. Let v be the mean of eps - x_0 given x_t. The target "pred_u" of (19) is
the average of v along the flow,

    u(x_t, t, s) = 1 / (t - s) integral_s^t v(x_r, r) dr,   x_s = x_t - (t - s) / T u(x_t, t, s)      (20)

which is v itself for s = t. Differentiating (t - s) u with respect to t along the flow gives the identity for training:

    u = v - (t - s) du/dt,   du/dt = v / T grad_x u + partial_t u                                     (21)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from diffusion_jax.diffusion import Predict, as_column, check_shape, q_sample, signal_and_noise
from diffusion_jax.sampling import SamplerTable, Steps, as_times, make_table
from diffusion_jax.schedules import NoiseSchedule, flow_schedule

Network = Callable[[Array, Array, Array], Array]
"""network(x_t, t, s) -> the prediction, of x_t's shape, for 0 <= s <= t <= T."""
SMALL = 1e-3


def jump_target(
    schedule: NoiseSchedule,
    x_t: Float[Array, "B *shape"],
    t: Real[Array, " B"],
    x_s: Float[Array, "B *shape"],
    s: Real[Array, " B"],
) -> Float[Array, "B *shape"]:
    """The x_0_hat whose step leads from x_t to x_s (eq. 19); NaN where s = t. Raises ValueError unless x_s has x_t's shape."""
    check_shape("x_s", x_s, x_t)
    (signal_t, noise_t), (signal_s, noise_s) = (signal_and_noise(schedule, time, x_t) for time in (t, s))
    a = noise_s / noise_t
    return ((x_s - a * x_t) / (signal_s - a * signal_t)).astype(x_t.dtype)


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
    """The squared distance between u(x_t, t, s) and the right side of eq. 21, which is held constant. Unreduced.

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
    """predict(x_t, t) = network(x_t, t, s), where the row of `table` at t leads to s.

    The table is `ddim_table` with eta = 0, whose steps are those of eq. 19, or `consistency_table`, for which s is always 0. A
    t that is not in the table gives NaN. Do not clip x_0_hat: it is an image only if s = 0.
    """

    def predict(x_t: Float[Array, "B *shape"], t: Real[Array, " B"]) -> Any:
        times, a = (jnp.asarray(column, jnp.float32) for column in (table.t, table.a))
        following = jnp.where(a == 0, 0.0, jnp.append(times[1:], 0))
        s = jnp.nanmax(jnp.where(times[None] == t[:, None], following[None], jnp.nan), axis=1)
        return network(x_t, t, s)

    return predict


def consistency_table(schedule: NoiseSchedule, sampling_timesteps: Steps = None) -> SamplerTable:
    """Predict the data, then noise it again: x_s = signal_s x_0_hat + noise_s z [Song et al. 2023, alg. 1].

    Raises ValueError on steps outside 1..T.
    """
    times = as_times(schedule, sampling_timesteps)
    signal, noise = schedule.at(times[1:])
    return make_table(schedule, times[:-1], 0.0, signal, noise)
