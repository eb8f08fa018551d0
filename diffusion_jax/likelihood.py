"""The variational bound of the likelihood: its terms, in bits, and training a network on it and on its own variances.

With t and s = t - 1, and k, m and w of eq. 10, a step of ancestral sampling has the likelihood N(k x_t + m x_0_hat, c^2 I), and

    -log p(x_0) <= E[L_T + L_{T-1} + ... + L_0],  over x_t ~ q(x_t | x_0)           (14)  [Ho et al. 2020, eq. 5]
    L_T     = KL(q(x_T | x_0) || N(0, I))
    L_{t-1} = KL(N(k x_t + m x_0, w I) || N(k x_t + m x_0_hat, c^2 I))
            = (delta + e^-delta - 1 + e^-delta |x_0 - x_0_hat|^2 m^2 / w) / 2       (15)
    L_0     = -log of the mass of N(x_0_hat, c^2 I) in the level of x_0, one of 256 from -1 to 1

where delta = log(c^2 / w) is 0 for the "lower_bound" of the variance, log(beta_t / w) for the "upper_bound", and for "learned"
what a fraction f from the network makes it:

    log c^2 = (1 - f) log w + f log beta_t                                          (16)  [Nichol & Dhariwal 2021, eq. 15]

w is 0 at t = 1; that of t = 2 is taken there, as the authors' code does (beta_1 where T = 1).

A network that learns its variance predicts a pair: the target, and f for each of its elements. What the functions return
is in bits, that is divided by log 2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, ArrayLike, Float, Int, Key

from diffusion_jax.diffusion import (
    Denoise,
    Predict,
    _as_column,
    _check_shape,
    _draw,
    _weighted,
    convert,
    look_up,
    loss_at,
    posterior_coefficients,
    q_sample,
    with_fraction,
)
from diffusion_jax.schedules import NoiseSchedule

BOUND_WEIGHT = 1e-3
FAR = 1e4  # deviations; infinity has no gradient
LN2 = math.log(2)


def prior_bits(schedule: NoiseSchedule, x_0: Float[Array, "B *shape"]) -> Float[Array, " B"]:
    """L_T, in bits: what is left of the data at t = T (eq. 14)."""
    a_2, s_2 = float(schedule.alpha_bar[-1]), float(schedule.sqrt_one_minus_alpha_bar[-1] ** 2)
    x_0 = x_0.astype(jnp.promote_types(x_0.dtype, jnp.float32))
    nats = (a_2 * x_0**2 + (s_2 - 1 - math.log(s_2))) / 2
    return nats.reshape(len(x_0), -1).sum(1) / LN2


def bound_bits(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_0: Float[Array, "B *shape"],
    t: Int[Array, " B"],
    eps: Float[Array, "B *shape"],
    sigma_type: str = "lower_bound",
) -> Float[Array, " B"]:
    """L_{t-1} of each example, in bits, with x_t from `eps`; their sum over t = 1..T and `prior_bits` is the bound (eq. 14).

    That is in expectation over `eps`. x_0 is one of the 256 levels, as L_0 is of those. Raises ValueError on a `sigma_type`
    other than "upper_bound", "lower_bound" and "learned", on a wrong shape, and where "learned" meets a network without f.
    """
    if sigma_type not in ("upper_bound", "lower_bound", "learned"):
        raise ValueError(f"sigma_type must be upper_bound, lower_bound or learned for a likelihood, got {sigma_type!r}")
    output = denoise(q_sample(schedule, x_0, t, eps), t)
    x_0_hat, fraction = _pair(output) if sigma_type == "learned" else with_fraction(output)
    _check_shape("x_0_hat", x_0_hat, x_0)
    fraction = {"upper_bound": 1.0, "lower_bound": 0.0}.get(sigma_type, fraction)
    return _terms(schedule, x_0, x_0_hat, t, fraction).reshape(len(x_0), -1).sum(1)


def hybrid_loss(
    schedule: NoiseSchedule,
    predict: Predict,
    x_0: Float[Array, "B *shape"],
    keys: Key[Array, " B"],
    target_type: str = "pred_eps",
    weight: Float[np.ndarray, " times"] | None = None,
) -> Float[Array, "B *shape"]:
    """Half of L_simple + 0.001 L_vlb, where the bound moves the variances alone [Nichol & Dhariwal 2021, eq. 16].

    Half of L_simple is the l2 loss, times weight[t] if given. Unreduced, at the t and eps of `diffusion_loss`. Raises
    ValueError on an unknown type, a table of another length, and unless the network predicts a pair.
    """
    t, eps = _draw(schedule, x_0, keys)
    x_t = q_sample(schedule, x_0, t, eps)
    prediction, fraction = _pair(predict(x_t, t))
    x_0_hat = convert(schedule, jax.lax.stop_gradient(prediction), x_t, t, target_type, "pred_x_0")
    simple = loss_at(schedule, lambda x_t, t: prediction, x_0, t, eps, target_type)
    bound = schedule.num_timesteps * _terms(schedule, x_0, x_0_hat, t, fraction)
    return _weighted(schedule, weight, t, simple) + BOUND_WEIGHT / 2 * bound


def bound_loss(
    schedule: NoiseSchedule,
    predict: Predict,
    x_0: Float[Array, "B *shape"],
    keys: Key[Array, " B"],
    target_type: str = "pred_eps",
) -> Float[Array, "B *shape"]:
    """L_0 + ... + L_{T-1}, in bits, estimated without bias from one t an example, drawn with the probabilities `importance`.

    Unreduced: an example's estimate is the sum over its elements. Raises ValueError unless the network predicts a pair.
    """
    probabilities = importance(schedule)
    t, eps = _draw(schedule, x_0, keys, probabilities)
    x_t = q_sample(schedule, x_0, t, eps)
    prediction, fraction = _pair(predict(x_t, t))
    x_0_hat = convert(schedule, prediction, x_t, t, target_type, "pred_x_0")
    return _terms(schedule, x_0, x_0_hat, t, fraction) / _as_column(look_up(probabilities, t - 1, x_0), x_0.ndim)


def importance(schedule: NoiseSchedule) -> Float[np.ndarray, " T"]:
    """Probabilities of t = 1..T under which single terms of the bound differ little, for an estimate with little variance.

    The best are in proportion to the root of each term's mean square [Nichol & Dhariwal 2021, eq. 18], there followed during
    training. Here they are in proportion to the terms' means, which are known beforehand for the best network for data
    N(0, I), where E |x_0 - x_0_hat|^2 = 1 - alpha_bar_t and c^2 = beta_t; and a tenth is spread over all t.
    """
    _, _, log_range = _step_tables(schedule)
    last = np.log(127.5 * np.sqrt(2 * np.pi * np.e * schedule.beta[1]))  # nats of N(0, beta_1) in levels 1 / 127.5 apart
    expected = np.append(max(last, 0), log_range[1:] / 2)
    return 0.9 * expected / expected.sum() + 0.1 / len(expected)


def _pair(output: object) -> tuple[Array, Array]:
    if not isinstance(output, tuple):
        raise ValueError("the network must predict a pair, its target and the fraction of its variance; it predicts one array")
    return with_fraction(output)  # pyright: ignore[reportReturnType]


def _step_tables(schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w, m and log(beta_t / w) of eqs. 15-16 for t = 1..T, in float64."""
    times = np.arange(1, schedule.num_timesteps + 1)
    _, m, w = posterior_coefficients(schedule, times, times - 1)
    w[0] = w[1] if len(w) > 1 else schedule.beta[1]
    return w, m, np.log(schedule.beta[1:] / w)


def _terms(schedule: NoiseSchedule, x_0: Array, x_0_hat: Array, t: Array, fraction: ArrayLike) -> Float[Array, "B *shape"]:
    """L_{t-1} of each element, in bits (eqs. 14-16)."""
    w, m, log_range = _step_tables(schedule)
    columns = (m**2 / w, np.sqrt(w), log_range)
    error_weight, deviation, log_range = (_as_column(look_up(column, t - 1, x_0), x_0.ndim) for column in columns)
    delta = log_range * fraction
    divergence = (delta + jnp.expm1(-delta) + jnp.exp(-delta) * error_weight * (x_0 - x_0_hat) ** 2) / 2
    nats = jnp.where(_as_column(t, x_0.ndim) > 1, divergence, -_log_mass(x_0, x_0_hat, deviation * jnp.exp(delta / 2)))
    return nats / LN2


def _log_mass(x: Array, mean: Array, sigma: Array) -> Array:
    """log of the mass of N(mean, sigma^2) from x - 1/255 to x + 1/255; from -1 it reaches down, and from 1 up, without end."""
    mirror = jnp.where(x > mean, -1.0, 1.0)  # to the lower tail, where the logarithm of the cumulative distribution is exact
    x, mean = mirror * x, mirror * mean
    upper = norm.logcdf(jnp.where(x > 0.999, FAR, (x - mean + 1 / 255) / sigma))
    lower = norm.logcdf(jnp.where(x < -0.999, -FAR, (x - mean - 1 / 255) / sigma))
    return upper + jnp.log1p(-jnp.exp(jnp.minimum(lower - upper, -1e-7)))
