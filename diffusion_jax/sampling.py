"""Sampling: every sampler is a table of affine steps, and one loop runs them all (docs/derivation.md).

A sampler walks down times t_S > ... > t_0 = 0. Each of its S steps goes from t to the next lower s:

    x_0_hat = denoise(x_t, t)
    x_s     = a x_t + b x_0_hat + c z + d_1 y_1 + d_2 y_2 + d_3 y_3,  z ~ N(0, I)   (8)

Each step stores y = e x_t + f x_0_hat, by default x_0_hat itself. y_1, y_2 and y_3 are the values stored by the last three
steps, newest first, and 0 before the first step. All coefficients are known before the network is called. The last step adds
no noise and ends at x_0_hat. With a learned variance, c e^(r fraction) replaces c: the network also returns a fraction, which
interpolates from the smallest standard deviation to the largest in log space.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, Key

from diffusion_jax.diffusion import Denoise, check_choice, posterior_coefficients, with_fraction
from diffusion_jax.schedules import NoiseSchedule, karras_sigmas

SigmaType = Literal["upper_bound", "lower_bound", "zero", "learned"]
Spacing = Literal["time", "log_snr", "karras", "flow"]
Steps = int | Float[np.ndarray, " times"] | None
"""A number S of steps evenly spaced in t, or an array of times such as `sampling_times` returns, or None for all T steps."""
Column = Float[np.ndarray, " S"]
FLOW_POWER = 1.2
MEMORY = 3


class SamplerTable(NamedTuple):
    """The coefficients of eq. 8, one row per step, in the order of sampling.

    `t` is the time at which a step calls the network, and `scale` is the standard deviation of x_t at that time for data of
    unit variance. r is 0 unless the variance is learned.
    """

    t: Column
    scale: Column
    a: Column
    b: Column
    c: Column
    r: Column
    d: Float[np.ndarray, "S 3"]
    e: Column
    f: Column


def make_table(schedule: NoiseSchedule, t: Column, a: Any, b: Any, c: Any = 0.0, r: Any = 0.0, d: Any = None) -> SamplerTable:
    """A float64 table of steps at times `t`, with e = 0 and f = 1. A scalar fills its column; d is 0 by default."""
    columns = (t, np.hypot(*schedule.at(t)), a, b, c, r, 0.0, 1.0)
    t, scale, a, b, c, r, e, f = (np.array(np.broadcast_to(column, len(t)), np.float64) for column in columns)
    return SamplerTable(t, scale, a, b, c, r, np.zeros((len(t), MEMORY)) if d is None else d, e, f)


def sampling_times(
    schedule: NoiseSchedule, sampling_timesteps: int | None = None, spacing: str = "time", rho: float = 7.0
) -> Float[np.ndarray, " times"]:
    """The times T = t_S > ... > t_0 = 0 of S = `sampling_timesteps` steps (T by default).

    "time" spaces them evenly in t and rounds to rows. The others give real times, rounded to float32: "log_snr" spaces them
    evenly in log(sigma), sigma = noise / signal, and "karras" in sigma^(1 / rho) [Karras et al. 2022, eq. 5], both down to
    t_1 = 1. If signal_T is 0, these two space them from the last row with signal. "flow" spaces them evenly in
    u = 1 / (1 + sigma^(-1 / 1.2)), which is close to t / T of rectified flow, so sigma_1 decreases as S grows.
    Raises ValueError on an unknown spacing, unless 1 <= S <= T, or if two times are equal in float32.
    """
    check_choice("spacing", spacing, get_args(Spacing))
    rows = strided_timesteps(schedule.num_timesteps, sampling_timesteps)
    if spacing == "time" or len(rows) == 2:
        return rows.astype(np.float64)
    steps, sigma = len(rows) - 1, schedule.sigma[np.isfinite(schedule.sigma)]
    if spacing == "flow":
        first, last = 1 / (1 + schedule.sigma[[1, -1]] ** (-1 / FLOW_POWER))
        u = np.linspace(max(first, last / steps), last, steps)[:-1]
        sigmas = (u / (1 - u)) ** FLOW_POWER
    elif spacing == "karras":
        sigmas = karras_sigmas(steps, sigma[1], sigma[-1], rho)[:-1]
    else:
        sigmas = np.geomspace(sigma[1], sigma[-1], steps)[:-1]
    between = schedule.time_of(sigmas[::-1]).astype(np.float32).astype(np.float64)
    times = np.concatenate([[schedule.num_timesteps], between, [0.0]])
    if not np.all(np.diff(times) < 0):
        raise ValueError(f"{steps} times spaced in {spacing} are too close for float32: take fewer, or another spacing")
    return times


def strided_timesteps(num_timesteps: int, sampling_timesteps: int | None = None) -> Int[np.ndarray, " times"]:
    """Integer times T = t_S > ... > t_0 = 0, evenly spaced up to rounding; S = T if `sampling_timesteps` is None.

    Raises ValueError unless `sampling_timesteps` is a whole number from 1 to `num_timesteps`.
    """
    steps = num_timesteps if sampling_timesteps is None else sampling_timesteps
    if not (1 <= steps <= num_timesteps and steps % 1 == 0):
        raise ValueError(f"sampling_timesteps must be between 1 and num_timesteps = {num_timesteps}, got {steps}")
    return np.rint(num_timesteps * np.arange(steps, -1, -1) / steps).astype(np.int32)


def as_times(schedule: NoiseSchedule, steps: Steps) -> Float[np.ndarray, " times"]:
    """Convert `steps` to times. Raises ValueError unless they decrease strictly from at most T to 0."""
    if steps is None or np.ndim(steps) == 0:
        return sampling_times(schedule, steps)  # pyright: ignore[reportArgumentType]
    times = np.asarray(steps, np.float32).astype(np.float64)
    inside = times.ndim == 1 and len(times) > 1 and times[-1] == 0 and times[0] <= schedule.num_timesteps
    if not (inside and np.all(np.diff(times) < 0)):
        raise ValueError(f"times must go strictly down to 0, from at most T = {schedule.num_timesteps}, got {times}")
    return times


def ancestral_table(schedule: NoiseSchedule, sigma_type: str = "upper_bound", sampling_timesteps: Steps = None) -> SamplerTable:
    """Ancestral sampling: draw x_s from the posterior (eq. 7) at x_0_hat, strided for S < T [Ho et al. 2020, alg. 2].

    `sigma_type` selects the variance c^2. "upper_bound" is the variance of x_s given x_t for x_0 ~ N(0, I), or beta_{t|s} on
    variance-preserving paths. "lower_bound" is the posterior variance, exact for data of one point [Ho et al. 2020, sec. 3.2].
    "zero" takes the posterior mean (this is not DDIM). "learned" lies between the two bounds at the network's fraction [Nichol
    & Dhariwal 2021, eq. 15], or at the lower if there is none. Raises ValueError on an unknown type or steps outside 1..T.
    """
    check_choice("sigma_type", sigma_type, get_args(SigmaType))
    times = as_times(schedule, sampling_timesteps)
    t, s = times[:-1], times[1:]
    k, m, w, unknown = posterior_coefficients(schedule, t, s)
    variance = {"upper_bound": unknown, "zero": np.zeros_like(w)}.get(sigma_type, w)
    log_range = np.log(unknown / np.where(s == 0, unknown, w)) / 2 if sigma_type == "learned" else 0.0
    return make_table(schedule, t, k, m, np.where(s == 0, 0.0, np.sqrt(variance)), r=log_range)


def ddim_table(schedule: NoiseSchedule, eta: float = 0.0, sampling_timesteps: Steps = None) -> SamplerTable:
    """DDIM [Song et al. 2021, eqs. 12, 16]: deterministic at eta = 0, lower-bound ancestral sampling at eta = 1.

        c = eta sqrt(w),   x_s = signal_s x_0_hat + sqrt(noise_s^2 - c^2) eps_hat + c z      (9)

    with eps_hat from eq. 5 and w from eq. 7. Raises ValueError on eta outside [0, 1] or steps outside 1..T.
    """
    return ddim_steps(schedule, as_times(schedule, sampling_timesteps), eta)


def ddim_steps(schedule: NoiseSchedule, times: Float[np.ndarray, " times"], eta: float = 0.0) -> SamplerTable:
    """DDIM steps through `times`, which may also increase if eta = 0. Raises ValueError on eta outside [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    (signal_t, noise_t), (signal_s, noise_s) = schedule.at(times[:-1]), schedule.at(times[1:])
    variance = eta**2 * posterior_coefficients(schedule, times[:-1], times[1:])[2] if eta else 0.0
    a = np.sqrt(noise_s**2 - variance) / noise_t
    return make_table(schedule, times[:-1], a, signal_s - a * signal_t, np.sqrt(variance))


def padded(table: SamplerTable, num_steps: int) -> SamplerTable:
    """Pad a table with rows of zeros to `num_steps` rows, so that samplers of any kind and length share one compiled `sample`.

    `sample` stops at the first row with t = 0. Do not use it with `sample_trajectory`, which runs every row and ends at 0.
    Raises ValueError if the table has more than `num_steps` rows.
    """
    missing = num_steps - len(table.t)
    if missing < 0:
        raise ValueError(f"num_steps must be at least the table's {len(table.t)} steps, got {num_steps}")
    return SamplerTable(*(np.pad(column, [(0, missing)] + [(0, 0)] * (np.ndim(column) - 1)) for column in table))


def sample(
    denoise: Denoise,
    table: SamplerTable,
    keys: Key[Array, " B"],
    shape: tuple[int, ...],
    start: Float[Array, "B *shape"] | None = None,
) -> Float[Array, "B *shape"]:
    """Draw one x_0 of `shape` for each key (eq. 8). Memory does not grow with the number of steps.

    Sampling starts from `start`, an x_t at the table's first t, or by default from float32 normal noise with the table's first
    `scale` as standard deviation. Samples have start's dtype. Sample i depends only on keys[i] and start[i], not on the batch
    size or the number of devices. The loop stops at the first row with t = 0 or after the last row. It is a while loop, so it
    has no reverse-mode gradient; `sample_trajectory` has one. Raises ValueError unless `start` is floating point and of shape
    [B, *shape].
    """
    begin = first_state(table, keys, shape, start)
    table = _cast(table, begin[0])

    def step(carry):
        number, state = carry
        return number + 1, take_step(denoise, jax.tree.map(lambda column: column[number], table), state, keys, number)

    def running(carry):
        return (carry[0] < len(table.t)) & (table.t[carry[0]] > 0)

    return jax.lax.while_loop(running, step, (0, begin))[1][0]


def sample_trajectory(
    denoise: Denoise,
    table: SamplerTable,
    keys: Key[Array, " B"],
    shape: tuple[int, ...],
    start: Float[Array, "B *shape"] | None = None,
) -> Float[Array, "times B *shape"]:
    """Like `sample`, but returns x_t at every time: index 0 is x_0, and the last index is the starting point.

    Raises ValueError as `sample` does.
    """

    def step(state, numbered_row):
        number, row = numbered_row
        state = take_step(denoise, row, state, keys, number)
        return state, state[0]

    begin = first_state(table, keys, shape, start)
    _, path = jax.lax.scan(step, begin, (jnp.arange(len(table.t)), _cast(table, begin[0])))
    return jnp.concatenate([begin[0][None], path])[::-1]


def first_state(
    table: SamplerTable, keys: Key[Array, " B"], shape: tuple[int, ...], start: Float[Array, "B *shape"] | None = None
) -> tuple[Array, ...]:
    """(x_t, 0, 0, 0) before the first step, for `take_step`. Arguments and errors are those of `sample`."""
    if start is None:
        start = jnp.asarray(table.scale, jnp.float32)[0] * _normal(keys, 0, shape, jnp.float32)
    if start.shape != (len(keys), *shape):
        raise ValueError(f"start must have the shape {(len(keys), *shape)}, got {start.shape}")
    if not jnp.issubdtype(start.dtype, jnp.floating):
        raise ValueError(f"start must be of floating point, got {start.dtype}")
    return (jnp.asarray(start), *[jnp.zeros_like(start)] * MEMORY)


def take_step(
    denoise: Denoise, row: Any, state: tuple[Array, ...], keys: Key[Array, " B"], number: int | Array
) -> tuple[Array, ...]:
    """One step of eq. 8, from (x_t, y_1, y_2, y_3) to (x_s, y, y_1, y_2), to write your own loop.

    `row` is row `number` of the table, cast to x_t's dtype, but at least float32.
    """
    x_t, *kept = state
    x_0_hat, fraction = with_fraction(denoise(x_t, jnp.full(len(x_t), row.t, jnp.float32)))
    deviation = row.c * jnp.exp(row.r * fraction)
    noise = _normal(keys, number + 1, x_t.shape[1:], row.c.dtype)
    x_s = row.a * x_t + row.b * x_0_hat + deviation * noise
    for i, y in enumerate(kept):
        x_s = x_s + row.d[i] * y
    y = row.e * x_t + row.f * x_0_hat
    return (x_s.astype(x_t.dtype), y.astype(x_t.dtype), *kept[:-1])


def _cast(table: SamplerTable, x: Array) -> Any:
    """Cast the table to x's dtype, but at least to float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jax.tree.map(lambda column: jnp.asarray(column, dtype), table)


def _normal(keys: Array, number: int | Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """The noise of step `number`, counted from 1, for each key. Number 0 is the starting noise."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape, dtype))(keys)
