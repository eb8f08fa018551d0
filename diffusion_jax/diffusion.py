"""The diffusion process as pure functions: noising, prediction targets and the posterior.

x_t is affine in the data x_0 and the noise eps. A network takes x_t and t and predicts a target, also affine in x_0 and eps:

    x_t    = signal_t x_0 + noise_t eps                                             (1)
    target = p_t x_0 + q_t eps                                                      (4)

    target       p, q
    pred_x_0     1, 0
    pred_eps     0, 1                                                               [Ho et al. 2020, eq. 14]
    pred_v       -noise, signal                                                     [Salimans & Ho 2022, sec. 4]
    pred_u       -1, 1                                                              [Lipman et al. 2023]
    edm          noise / (sigma_data n), -sigma_data signal / n, n^2 = noise^2 + sigma_data^2 signal^2
                                                                                    [F of Karras et al. 2022, eq. 7]

Given x_t, a target determines x_0 and eps, and so every other target. With det = signal q - noise p,

    x_0 = (q x_t - noise target) / det,   eps = (signal target - p x_t) / det       (5)

Given x_0 and x_t, x_s at an earlier time s < t is Gaussian [Ho et al. 2020, eqs. 6-7, for s = t - 1]. With
up = signal_t / signal_s,

    beta_{t|s} = noise_t^2 - up^2 noise_s^2                                         (6)
    q(x_s | x_t, x_0) = N(k x_t + m x_0, w I)                                       (7)
      k = up noise_s^2 / noise_t^2,  m = signal_s beta_{t|s} / noise_t^2,  w = beta_{t|s} noise_s^2 / noise_t^2

Arrays are [B, *shape] with any shape. t is [B], integer or real; at real times the schedule's columns are interpolated
linearly. A time outside 0..T gives NaN. Results have the data's dtype. Losses, variances and cast tables have it too, but at
least float32. docs/derivation.md derives each equation.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int, Real

from diffusion_jax.schedules import NoiseSchedule

TargetType = Literal["pred_x_0", "pred_eps", "pred_v", "pred_u", "edm"]
SIGMA_DATA = 0.5
Target = str | Callable[[Any, Any], tuple[Any, Any]]
"""A `TargetType`, or a function of the schedule's columns: columns(signal, noise) -> (p, q), such as
`partial(edm_target, sigma_data=1.0)`."""
Predict = Callable[[Array, Array], Any]
"""A network: predict(x_t, t) -> its target, of x_t's shape. With a learned variance it returns a pair (target, fraction), and
the fraction of each element interpolates the variance between its bounds in log space [Nichol & Dhariwal 2021, eq. 15]."""
Denoise = Callable[[Array, Array], Any]
"""denoise(x_t, t) -> x_0_hat, whichever target the network predicts; with a learned variance, a pair (x_0_hat, fraction)."""


def q_sample(
    schedule: NoiseSchedule, x_0: Float[Array, "B *shape"], t: Real[Array, " B"], eps: Float[Array, "B *shape"]
) -> Float[Array, "B *shape"]:
    """x_t: the data x_0 noised to time t with standard normal noise `eps` (eq. 1).

    Raises ValueError unless eps has x_0's shape and t has shape [B].
    """
    check_shape("eps", eps, x_0)
    signal, noise = signal_and_noise(schedule, t, x_0)
    return (signal * x_0 + noise * eps).astype(float_dtype(x_0))


def edm_target(signal: Any, noise: Any, sigma_data: float = SIGMA_DATA) -> tuple[Any, Any]:
    """p and q of Karras et al.'s network output F (2022, eq. 7), for data with standard deviation `sigma_data`."""
    norm = (noise**2 + (sigma_data * signal) ** 2) ** 0.5
    return noise / (sigma_data * norm), -sigma_data * signal / norm


def target_columns(target_type: Target, signal: Any, noise: Any) -> tuple[Any, Any]:
    """p and q of eq. 4, from the columns of a schedule or their values at some t. Raises ValueError on an unknown type."""
    if callable(target_type):
        return target_type(signal, noise)
    check_choice("target_type", target_type, get_args(TargetType))
    columns = {"pred_x_0": (1.0, 0.0), "pred_eps": (0.0, 1.0), "pred_v": (-noise, signal), "pred_u": (-1.0, 1.0)}
    return edm_target(signal, noise) if target_type == "edm" else columns[target_type]


def convert(
    schedule: NoiseSchedule,
    prediction: Float[Array, "B *shape"],
    x_t: Float[Array, "B *shape"],
    t: Real[Array, " B"],
    from_type: Target,
    to_type: Target,
) -> Float[Array, "B *shape"]:
    """Convert a prediction of one target at x_t into a prediction of another (eqs. 4-5).

    The result is NaN or infinite where the first does not determine the second: from pred_x_0 at t = 0, or from pred_eps
    where signal is 0. Raises ValueError on an unknown type, or unless the prediction has x_t's shape.
    """
    check_shape("prediction", prediction, x_t)
    signal, noise = signal_and_noise(schedule, t, x_t)
    (p, q), (to_p, to_q) = (target_columns(target_type, signal, noise) for target_type in (from_type, to_type))
    if from_type == to_type:
        return prediction
    det = signal * q - noise * p
    on_x_t, on_prediction = (to_p * q - to_q * p) / det, (signal * to_q - noise * to_p) / det
    return (on_x_t * x_t + on_prediction * prediction).astype(jnp.result_type(x_t, prediction))


def make_denoiser(
    schedule: NoiseSchedule, predict: Predict, target_type: Target = "pred_eps", clip: float | None = None
) -> Denoise:
    """Make denoise(x_t, t) -> x_0_hat from a network that predicts `target_type` (eq. 5). Keeps the fraction, if any.

    `clip` bounds x_0_hat to [-clip, clip], in the units of the data. Use it for images scaled to [-1, 1]; it also keeps
    x_0_hat bounded where eq. 5 divides pred_eps by a small signal. Raises ValueError on an unknown type, on a `clip` that is
    not positive, and if the target does not determine x_0 at some t >= 1, such as pred_eps at t = T of rectified flow.
    """
    p, q = target_columns(target_type, *schedule)
    lost = (schedule.signal * q - schedule.noise * p)[1:] == 0
    if not isinstance(schedule.signal, Tracer) and np.any(lost):
        raise ValueError(f"x_0 does not follow from {target_type} at t = {1 + int(np.argmax(lost))} of this schedule")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip}")

    def denoise(x_t: Float[Array, "B *shape"], t: Real[Array, " B"]) -> Any:
        output = predict(x_t, t)
        x_0_hat = convert(schedule, with_fraction(output)[0], x_t, t, target_type, "pred_x_0")
        return with_prediction(output, x_0_hat if clip is None else jnp.clip(x_0_hat, -clip, clip))

    return denoise


def normalized(schedule: NoiseSchedule, network: Predict, time: str = "t") -> Predict:
    """Wrap `network` so that its input is x_t / sqrt(signal^2 + noise^2), which has unit variance for data of unit variance.

    On variance-preserving paths this is x_t itself. Between rows the divisor is linear in t. With `time` "log_snr" the network
    gets 2000 / pi arctan(noise / signal) in place of t: a number from 0 to 1000 that depends only on the log-SNR, so a network
    for pred_x_0, pred_eps or edm can be used on another path. Raises ValueError on an unknown `time`.
    """
    check_choice("time", time, ("t", "log_snr"))
    scale = (schedule.signal**2 + schedule.noise**2) ** 0.5

    def predict(x_t: Float[Array, "B *shape"], t: Real[Array, " B"]) -> Any:
        signal, noise = (look_up(column, t, x_t) for column in schedule)
        told = t if time == "t" else 2000 / np.pi * jnp.arctan2(noise, signal)
        return network((x_t / as_column(look_up(scale, t, x_t), x_t.ndim)).astype(x_t.dtype), told)

    return predict


def with_fraction(output: Any) -> tuple[Array, Array | float]:
    """The output as a pair (prediction, fraction), with fraction 0 if it has none. Raises ValueError if the shapes differ."""
    if not isinstance(output, tuple):
        return output, 0.0
    if len(output) != 2 or output[0].shape != output[1].shape:
        raise ValueError(f"a prediction with a fraction must be a pair of one shape, got {[part.shape for part in output]}")
    return output


def with_prediction(output: Any, prediction: Array) -> Any:
    """Replace the prediction in `output` and keep its fraction if it has one."""
    return (prediction, output[1]) if isinstance(output, tuple) else prediction


def posterior_coefficients(
    schedule: NoiseSchedule, t: Real[np.ndarray, " S"], s: Real[np.ndarray, " S"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """k, m and w of q(x_s | x_t, x_0) for 0 <= s < t <= T (eq. 7), and the variance of x_s given x_t for x_0 ~ N(0, I)."""
    (signal_t, noise_t), (signal_s, noise_s) = schedule.at(t), schedule.at(s)
    up, shrink = signal_t / signal_s, (noise_s / noise_t) ** 2
    beta = noise_t**2 - (up * noise_s) ** 2
    unknown = beta * (signal_s**2 + noise_s**2) / (signal_t**2 + noise_t**2)
    return up * shrink, signal_s * beta / noise_t**2, beta * shrink, unknown


def posterior(
    schedule: NoiseSchedule, x_0: Float[Array, "B *shape"], x_t: Float[Array, "B *shape"], t: Int[Array, " B"]
) -> tuple[Float[Array, "B *shape"], Float[Array, " B"]]:
    """Mean and variance of q(x_{t-1} | x_t, x_0) for integer t in 1..T (eq. 7 with s = t - 1).

    Raises ValueError unless x_0 has x_t's shape.
    """
    check_shape("x_0", x_0, x_t)
    times = np.arange(1, schedule.num_timesteps + 1)
    k, m, w = (look_up(column, t - 1, x_t) for column in posterior_coefficients(schedule, times, times - 1)[:3])
    mean = as_column(k, x_t.ndim) * x_t + as_column(m, x_t.ndim) * x_0
    return mean.astype(float_dtype(x_t)), w


def signal_and_noise(schedule: NoiseSchedule, t: Array, x: Array) -> tuple[Array, Array]:
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have the shape {x.shape[:1]}, a timestep for each example, got {t.shape}")
    signal, noise = (look_up(column, t, x) for column in schedule)
    return as_column(signal, x.ndim), as_column(noise, x.ndim)


def float_dtype(x: ArrayLike) -> jnp.dtype:
    """The dtype of x in JAX (float64 only if x64 is enabled), or float32 if x is not floating point."""
    dtype = jnp.result_type(x)
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(jnp.float32)


def look_up(table: ArrayLike, t: Real[Array, " B"], like: ArrayLike) -> Float[Array, " B"]:
    """table[t], linear between rows and NaN out of range; sharded like t, in the dtype of `like` but at least float32."""
    table = jnp.asarray(table, jnp.promote_types(float_dtype(like), jnp.float32))
    options: Any = {"mode": "fill", "fill_value": jnp.nan, "wrap_negative_indices": False}

    def row_at(row):
        return table.at[row].get(**options, out_sharding=jax.typeof(t).sharding)

    if jnp.issubdtype(t.dtype, jnp.integer):
        return row_at(t)
    row = jnp.minimum(jnp.floor(t), max(len(table) - 2, 0)).astype(jnp.int32)
    share = (t - row).astype(table.dtype)
    between = (1 - share) * row_at(row) + share * row_at(jnp.minimum(row + 1, len(table) - 1))
    return jnp.where(t <= len(table) - 1, between, jnp.nan)


def as_column(per_example: Array, ndim: int) -> Array:
    return per_example.reshape(-1, *(1,) * (ndim - 1))


def check_shape(name: str, value: Array, like: Array) -> None:
    if value.shape != like.shape:  # broadcasting would hide the mistake
        raise ValueError(f"{name} must have the shape of the data, {like.shape}, got {value.shape}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
