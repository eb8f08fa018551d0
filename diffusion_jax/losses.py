"""The training loss: the distribution of t, the distance from a prediction to its target, and the weights.

Training minimizes E |prediction - target|^2 over t, eps and the data [Ho et al. 2020, eq. 14], with the target of eq. 4. t is
uniform on 1..T by default. `time_density` offers these probabilities of t = 1..T, and `draw_times` draws from them:

    uniform
    log_normal     log(noise / signal) ~ N(-1.2, 1.2^2)                             [Karras et al. 2022, table 1]
    logit_normal   log(t / (T - t)) ~ N(0, 1), mixed with a quarter of uniform      [Esser et al. 2024, sec. 3.1]
    importance     for low-variance estimates of the variational bound              [Nichol & Dhariwal 2021, sec. 3.3]
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Real
from scipy.special import logit, ndtr

from diffusion_jax.diffusion import (
    Predict,
    Target,
    as_column,
    check_choice,
    check_shape,
    float_dtype,
    look_up,
    posterior_coefficients,
    q_sample,
    signal_and_noise,
    target_columns,
    with_fraction,
)
from diffusion_jax.schedules import NoiseSchedule

TimeDensity = Literal["uniform", "log_normal", "logit_normal", "importance"]
LOG_SIGMA_MEAN, LOG_SIGMA_DEVIATION = -1.2, 1.2


def diffusion_loss(
    schedule: NoiseSchedule,
    predict: Predict,
    x_0: Float[Array, "B *shape"],
    keys: Key[Array, " B"],
    target_type: Target = "pred_eps",
    loss_type: str = "l2",
    weight: Float[np.ndarray, " times"] | None = None,
    t: Real[Array, " B"] | None = None,
) -> Float[Array, "B *shape"]:
    """The unreduced training loss, with one t and eps ~ N(0, I) for each example [Ho et al. 2020, eq. 14].

    t is uniform on 1..T unless given, for example from `draw_times`. The drawn t and eps depend only on the example's key, not
    on its batch or device. The loss is `loss_at` times weight[t], where `weight` is a table over t = 0..T.
    Raises ValueError on an unknown type or a `weight` of another length.
    """
    t, eps = draw_time_and_noise(schedule, x_0, keys, t)
    return weighted(schedule, weight, t, loss_at(schedule, predict, x_0, t, eps, target_type, loss_type))


def loss_at(
    schedule: NoiseSchedule,
    predict: Predict,
    x_0: Float[Array, "B *shape"],
    t: Real[Array, " B"],
    eps: Float[Array, "B *shape"],
    target_type: Target = "pred_eps",
    loss_type: str = "l2",
) -> Float[Array, "B *shape"]:
    """The distance from the network's prediction at x_t (eq. 1) to its target (eq. 4), per element and unweighted.

    "l2" is half the squared error, "l1" the absolute error. Raises ValueError on an unknown type, or unless eps and the
    prediction have x_0's shape.
    """
    check_choice("loss_type", loss_type, ("l2", "l1"))
    p, q = target_columns(target_type, *signal_and_noise(schedule, t, x_0))
    prediction, _ = with_fraction(predict(q_sample(schedule, x_0, t, eps), t))
    check_shape("prediction", prediction, x_0)
    target = p * x_0 + q * eps
    error = (prediction - target).astype(jnp.promote_types(float_dtype(target), jnp.float32))
    return error**2 / 2 if loss_type == "l2" else jnp.abs(error)


def min_snr_weight(schedule: NoiseSchedule, target_type: Target = "pred_eps", cap: float = 5.0) -> Float[np.ndarray, " times"]:
    """Weights that turn the target's squared error into min(SNR_t, cap) |x_0_hat - x_0|^2, SNR_t = signal_t^2 / noise_t^2.

    The cap keeps small t, where SNR_t is huge and x_0 easy to predict, from dominating training [Hang et al. 2023].
    Raises ValueError on an unknown type or a cap that is not positive.
    """
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")
    signal, noise = schedule
    p, q = target_columns(target_type, signal, noise)
    det = signal * q - noise * p  # by eq. 5, |error of the target| = |error of x_0| |det| / noise
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.minimum(signal**2, cap * noise**2) / det**2
    return np.where(det == 0, np.where(noise == 0, cap, 1.0), weight)  # limits: pred_x_0 at t = 0, pred_eps at 0 signal


def weighted(schedule: NoiseSchedule, weight: Any, t: Array, loss: Array) -> Array:
    """The loss times weight[t]. Raises ValueError unless the weights are a table over t = 0..T."""
    if weight is None:
        return loss
    if np.shape(weight) != (schedule.num_timesteps + 1,):
        raise ValueError(f"weight must have the shape {(schedule.num_timesteps + 1,)}, for t = 0..T, got {np.shape(weight)}")
    return as_column(look_up(weight, t, loss), loss.ndim) * loss


def draw_time_and_noise(
    schedule: NoiseSchedule, x_0: Float[Array, "B *shape"], keys: Key[Array, " B"], t: Real[Array, " B"] | None = None
) -> tuple[Real[Array, " B"], Float[Array, "B *shape"]]:
    """t (uniform on 1..T unless given) and eps ~ N(0, I) for each example, drawn from its key."""
    t_keys, eps_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    eps = jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:], jnp.result_type(x_0)))(eps_keys)
    if t is None:
        t = jax.vmap(lambda key: jax.random.randint(key, (), 1, schedule.num_timesteps + 1, jnp.int32))(t_keys)
    return t, eps


def time_density(schedule: NoiseSchedule, density: str) -> Float[np.ndarray, " T"]:
    """The probabilities of t = 1..T for a `density` listed at the top of this module.

    The uniform quarter of "logit_normal" makes sure that the largest t, where sampling starts, are trained. "importance" mixes
    one tenth uniform with nine tenths proportional to the mean of each term of the variational bound, in closed form for data
    N(0, I) and the best network. Nichol & Dhariwal (2021, eq. 18) instead use each term's root mean square,
    tracked during training. Raises ValueError on an unknown density.
    """
    check_choice("density", density, get_args(TimeDensity))
    times = np.arange(1, schedule.num_timesteps + 1)
    if density == "uniform":
        return np.full(len(times), 1 / len(times))
    if density == "importance":
        _, _, w, unknown = posterior_coefficients(schedule, times, times - 1)
        last = np.log(127.5 * np.sqrt(2 * np.pi * np.e * unknown[0]))  # entropy of N(0, unknown) in steps of 1 / 127.5
        expected = np.append(max(last, 0), np.log(unknown[1:] / w[1:]) / 2)
        return 0.9 * expected / expected.sum() + 0.1 / len(expected)
    if density == "log_normal":
        log_sigma, share = np.log(schedule.sigma[1:]), 0.0
        edges = ((log_sigma[1:] + log_sigma[:-1]) / 2 - LOG_SIGMA_MEAN) / LOG_SIGMA_DEVIATION
    else:
        edges, share = logit((times[1:] - 0.5) / schedule.num_timesteps), 0.25
    return (1 - share) * np.diff(ndtr(np.concatenate([[-np.inf], edges, [np.inf]]))) + share / len(times)


def draw_times(probabilities: Float[np.ndarray, " T"], u: Float[Array, " B"]) -> Int[Array, " B"]:
    """Draw t in 1..T with these probabilities, by inverting the cumulative distribution at u, uniform on [0, 1).

    Weights that do not sum to 1 count as proportions. For a low-discrepancy batch of size B, use
    u_i = (u_0 + i / B) modulo 1 [Kingma et al. 2021, app. I.1].
    """
    above = jnp.asarray(np.cumsum(probabilities)[:-1] / np.sum(probabilities), jnp.promote_types(u.dtype, jnp.float32))
    return 1 + jnp.searchsorted(above, u, side="right").astype(jnp.int32)
