"""Likelihoods: the variational bound, training on it, learned variances, and the density by the probability flow.

With s = t - 1 and k, m and w of eq. 7, a step of ancestral sampling draws x_s from N(k x_t + m x_0_hat, c^2 I). So

    -log p(x_0) <= E[L_T + L_{T-1} + ... + L_0],  over x_t ~ q(x_t | x_0)           (14)  [Ho et al. 2020, eq. 5]
    L_T     = KL(q(x_T | x_0) || N(0, (signal_T^2 + noise_T^2) I))
    L_{t-1} = KL(N(k x_t + m x_0, w I) || N(k x_t + m x_0_hat, c^2 I))
            = (delta + e^-delta - 1 + e^-delta |x_0 - x_0_hat|^2 m^2 / w) / 2       (15)
    L_0     = -log(mass of N(x_0_hat, c^2 I) in the bin of x_0), for x_0 one of 256 levels from -1 to 1

for each element, with delta = log(c^2 / w). The variance c^2 is w for the "lower_bound" and W for the "upper_bound". W is the
variance of x_{t-1} given x_t for x_0 ~ N(0, I), which is beta_t on variance-preserving paths. For "learned" the network
predicts a fraction:

    log c^2 = (1 - fraction) log w + fraction log W                                 (16)  [Nichol & Dhariwal 2021, eq. 15]

At t = 1, where w is 0, the w of t = 2 replaces it (W if T = 1), as in the authors' code. "fixed_large", which that code and
published results use, is "upper_bound" with the w of t = 2 at t = 1.

A network with a learned variance returns a pair: its target, and a fraction for each element. Results are in bits (nats
divided by log 2) unless a docstring says nats.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, ArrayLike, Float, Int, Key, Real

from diffusion_jax.diffusion import (
    Denoise,
    Predict,
    Target,
    as_column,
    check_choice,
    check_shape,
    convert,
    float_dtype,
    look_up,
    posterior_coefficients,
    q_sample,
    with_fraction,
)
from diffusion_jax.losses import draw_time_and_noise, draw_times, loss_at, time_density, weighted
from diffusion_jax.sampling import sample_trajectory
from diffusion_jax.schedules import NoiseSchedule
from diffusion_jax.solvers import multistep_table

BOUND_WEIGHT = 1e-3
FAR = 1e4  # standard deviations, in place of infinity, which has no gradient
LN2 = math.log(2)


def prior_bits(schedule: NoiseSchedule, x_0: Float[Array, "B *shape"]) -> Float[Array, " B"]:
    """L_T of each example in bits: the KL divergence of x_T from the prior (eq. 14)."""
    signal_2, noise_2 = float(schedule.signal[-1] ** 2), float(schedule.noise[-1] ** 2)
    total = signal_2 + noise_2
    x_0 = x_0.astype(jnp.promote_types(x_0.dtype, jnp.float32))
    nats = (signal_2 / total * x_0**2 + (noise_2 / total - 1 - math.log(noise_2 / total))) / 2
    return nats.reshape(len(x_0), -1).sum(1) / LN2


def bound_bits(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_0: Float[Array, "B *shape"],
    t: Int[Array, " B"],
    eps: Float[Array, "B *shape"],
    sigma_type: str = "lower_bound",
) -> Float[Array, " B"]:
    """L_{t-1} of each example in bits, at x_t from `eps` (eq. 14).

    The bound is `prior_bits` plus the sum over t = 1..T, in expectation over `eps`. x_0 must hold values of the 256 levels.
    Raises ValueError unless `sigma_type` is "upper_bound", "fixed_large", "lower_bound" or "learned", on a wrong shape, and if
    "learned" is used with a network without a fraction.
    """
    check_choice("sigma_type", sigma_type, ("upper_bound", "fixed_large", "lower_bound", "learned"))
    output = denoise(q_sample(schedule, x_0, t, eps), t)
    x_0_hat, fraction = _pair(output) if sigma_type == "learned" else with_fraction(output)
    check_shape("x_0_hat", x_0_hat, x_0)
    not_first = as_column(t > 1, x_0.ndim).astype(x_0_hat.dtype)
    fraction = {"upper_bound": 1.0, "fixed_large": not_first, "lower_bound": 0.0}.get(sigma_type, fraction)
    return _terms(schedule, x_0, x_0_hat, t, fraction).reshape(len(x_0), -1).sum(1)


def hybrid_loss(
    schedule: NoiseSchedule,
    predict: Predict,
    x_0: Float[Array, "B *shape"],
    keys: Key[Array, " B"],
    target_type: Target = "pred_eps",
    weight: Float[np.ndarray, " times"] | None = None,
    t: Real[Array, " B"] | None = None,
) -> Float[Array, "B *shape"]:
    """(L_simple + 0.001 L_vlb) / 2, unreduced. The bound L_vlb trains only the variances [Nichol & Dhariwal 2021, eq. 16].

    L_simple / 2 is the l2 loss, times weight[t] if given. t and eps are drawn as in `diffusion_loss`. Raises ValueError on an
    unknown type, on a `weight` of another length, and unless the network predicts a pair.
    """
    t, eps = draw_time_and_noise(schedule, x_0, keys, t)
    x_t = q_sample(schedule, x_0, t, eps)
    prediction, fraction = _pair(predict(x_t, t))
    x_0_hat = convert(schedule, jax.lax.stop_gradient(prediction), x_t, t, target_type, "pred_x_0")
    simple = loss_at(schedule, lambda x_t, t: prediction, x_0, t, eps, target_type)
    bound = schedule.num_timesteps * _terms(schedule, x_0, x_0_hat, t, fraction)
    return weighted(schedule, weight, t, simple) + BOUND_WEIGHT / 2 * bound


def bound_loss(
    schedule: NoiseSchedule,
    predict: Predict,
    x_0: Float[Array, "B *shape"],
    keys: Key[Array, " B"],
    target_type: Target = "pred_eps",
) -> Float[Array, "B *shape"]:
    """An unbiased estimate of L_0 + ... + L_{T-1} in bits, from one t per example, drawn from the density "importance".

    Unreduced: the estimate is the sum over an example's elements. Raises ValueError unless the network predicts a pair.
    """
    probabilities = time_density(schedule, "importance")
    t_keys = jax.vmap(jax.random.split)(keys)[:, 0]  # these draw t, not eps
    u = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(t_keys)
    t, eps = draw_time_and_noise(schedule, x_0, keys, draw_times(probabilities, u))
    x_t = q_sample(schedule, x_0, t, eps)
    prediction, fraction = _pair(predict(x_t, t))
    x_0_hat = convert(schedule, prediction, x_t, t, target_type, "pred_x_0")
    return _terms(schedule, x_0, x_0_hat, t, fraction) / as_column(look_up(probabilities, t - 1, x_0), x_0.ndim)


def flow_log_density(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_0: Float[Array, "B *shape"],
    keys: Key[Array, " B"],
    num_steps: int,
    probes: int | None = None,
) -> Float[Array, " B"]:
    """log p(x_0) in nats, from the probability flow between t = 1 and t = T [Song et al. 2021b, app. D.2].

    Along the flow, with v = x_t / signal and mu = log(noise / signal), dv/dmu = v - x_0_hat, so

        log p(x_0) = log N(x_T; 0, (signal_T^2 + noise_T^2) I) + D log signal_T + integral of (D - signal_t tr J_t) dmu     (13)

    for x_0 of D elements and J_t = d x_0_hat / d x_t. This is the density of the model's x_0 + sigma_1 eps, evaluated at x_0.
    It is exact only in the limit of many steps, so compare with twice as many. The trace is exact and takes D derivatives per
    step; with `probes` it is an unbiased estimate from that many random sign vectors, drawn from the example's key [Grathwohl
    et al. 2019, eq. 7]. If row T has no signal, the flow ends at the last row that has, and x is assumed normal there. Raises
    ValueError unless at least two rows have signal and noise and `num_steps` is at least 1.
    """
    x_0 = x_0.astype(jnp.promote_types(float_dtype(x_0), jnp.float32))
    finite = schedule.sigma[np.isfinite(schedule.sigma)]
    if len(finite) < 3 or num_steps < 1:
        raise ValueError(
            f"the flow needs two rows with signal and noise and at least one step, got {len(finite) - 1}, {num_steps}"
        )
    times = schedule.time_of(np.geomspace(finite[1], finite[-1], num_steps + 1)).astype(np.float32).astype(np.float64)
    signal, noise = schedule.at(times)
    from scipy.integrate import simpson  # slow to import, and used only here

    weights = simpson(np.eye(len(times)), x=np.log(noise / signal))
    table = multistep_table(schedule, times, 0.0, 3, corrects=True)
    start = jnp.asarray(signal[0], float_dtype(x_0)) * x_0
    path = sample_trajectory(denoise, table, keys, x_0.shape[1:], start)[::-1]

    def rate(row):
        x_t, t, signal_t = row
        t = jnp.full(len(x_t), t, jnp.float32)
        return x_0[0].size - signal_t * _trace(lambda x: with_fraction(denoise(x, t))[0], x_t, keys, probes)

    columns = (jnp.asarray(column, jnp.float32) for column in (times, signal))
    rates = jax.lax.map(rate, (path, *columns))
    total = signal[-1] ** 2 + noise[-1] ** 2
    elements = path[-1].reshape(len(x_0), -1).astype(rates.dtype)
    prior = -(elements**2 / total + math.log(2 * math.pi * total)).sum(1) / 2
    return prior + x_0[0].size * math.log(signal[-1]) + jnp.asarray(weights, rates.dtype) @ rates


def _trace(fn: Callable[[Array], Array], x: Array, keys: Array, probes: int | None) -> Float[Array, " B"]:
    """The trace of the Jacobian of fn(x)[i] with respect to x[i], exact or estimated with `probes`."""

    def along(direction):
        product = direction * jax.jvp(fn, (x,), (direction,))[1]
        return product.reshape(len(x), -1).astype(jnp.promote_types(x.dtype, jnp.float32)).sum(1)

    if probes is None:
        basis = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
        return jax.lax.map(lambda unit: along(jnp.broadcast_to(unit, x.shape)), basis).sum(0)
    signs = jax.vmap(partial(jax.random.rademacher, shape=(probes, *x.shape[1:]), dtype=x.dtype))(keys)
    return jax.lax.map(along, jnp.moveaxis(signs, 1, 0)).mean(0)


def flow_bits(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_0: Float[Array, "B *shape"],
    keys: Key[Array, " B"],
    num_steps: int,
    probes: int | None = None,
) -> Float[Array, " B"]:
    """An upper bound on -log P(x_0) in bits, in expectation over keys, for x_0 of the 256 levels from -1 to 1.

    Dequantizes x_0 with the noise of t = 1, v = x_0 + sigma_1 eps, and decodes v with the last step of ancestral sampling [Ho
    et al. 2019, eq. 12]: -log p(v) + log q(v | x_0) + L_0, with p from `flow_log_density`. Uniform dequantization
    would cost about log2(127.5 sigma_1 sqrt(2 pi)) bits per element if sigma_1 is far above a level.
    """
    x_0 = x_0.astype(jnp.promote_types(x_0.dtype, jnp.float32))
    spread_keys, trace_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    eps = jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:], x_0.dtype))(spread_keys)
    sigma = float(schedule.sigma[1])
    log_p = flow_log_density(schedule, denoise, x_0 + sigma * eps, trace_keys, num_steps, probes)
    log_q = -(eps**2 / 2 + math.log(2 * math.pi * sigma**2) / 2).reshape(len(x_0), -1).sum(1)
    return (log_q - log_p) / LN2 + bound_bits(schedule, denoise, x_0, jnp.ones(len(x_0), jnp.int32), eps)


def _pair(output: object) -> tuple[Array, Array]:
    if not isinstance(output, tuple):
        raise ValueError("the network must predict a pair, its target and the fraction of its variance; it predicts one array")
    return with_fraction(output)  # pyright: ignore[reportReturnType]


def _terms(schedule: NoiseSchedule, x_0: Array, x_0_hat: Array, t: Array, fraction: ArrayLike) -> Float[Array, "B *shape"]:
    """L_{t-1} of each element, in bits (eqs. 14-16)."""
    times = np.arange(1, schedule.num_timesteps + 1)
    _, m, w, unknown = posterior_coefficients(schedule, times, times - 1)
    w[0] = w[1] if len(w) > 1 else unknown[0]
    columns = (m**2 / w, np.sqrt(w), np.log(unknown / w))
    error_weight, deviation, log_range = (as_column(look_up(column, t - 1, x_0), x_0.ndim) for column in columns)
    delta = log_range * fraction
    divergence = (delta + jnp.expm1(-delta) + jnp.exp(-delta) * error_weight * (x_0 - x_0_hat) ** 2) / 2
    nats = jnp.where(as_column(t, x_0.ndim) > 1, divergence, -_log_mass(x_0, x_0_hat, deviation * jnp.exp(delta / 2)))
    return nats / LN2


def _log_mass(x: Array, mean: Array, sigma: Array) -> Array:
    """log of the mass of N(mean, sigma^2) from x - 1/255 to x + 1/255. The bins of x = -1 and x = 1 extend to infinity."""
    mirror = jnp.where(x > mean, -1.0, 1.0)  # use the lower tail, where logcdf is accurate
    x, mean = mirror * x, mirror * mean
    upper = norm.logcdf(jnp.where(x > 0.999, FAR, (x - mean + 1 / 255) / sigma))
    lower = norm.logcdf(jnp.where(x < -0.999, -FAR, (x - mean - 1 / 255) / sigma))
    return upper + jnp.log1p(-jnp.exp(jnp.minimum(lower - upper, -1e-7)))
