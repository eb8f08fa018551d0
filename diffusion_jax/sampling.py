"""Sampling: every sampler is a table of affine steps, and one loop runs any of them (docs/derivation.md).

A sampler walks down times t_S > ... > t_0 = 0. Each of its S steps goes from t to the next lower s:

    x_0_hat = denoise(x_t, t)
    x_s     = a x_t + b x_0_hat + c z + d_1 y_1 + d_2 y_2 + d_3 y_3,  z ~ N(0, I)   (8)

where y_1, y_2 and y_3 are what the last three steps kept of themselves, the newest first (0 before the first step). Each keeps
y = e x_t + f x_0_hat, which is x_0_hat where (e, f) = (0, 1). All coefficients are known before the network is called. The
last step adds no noise: it ends at x_0_hat. A network that learns its variance gives, beside x_0_hat, a fraction of the way
from the least deviation to the largest, in log space; then c e^(r fraction) stands for c, and r is known as well.
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
"""S, for steps evenly spaced in t; or times from `sampling_times`; or None for all T."""
Column = Float[np.ndarray, " S"]
FLOW_POWER = 1.2
MEMORY = 3


class SamplerTable(NamedTuple):
    """The coefficients of eq. 8, a row a step, first step first.

    `t` is the time that a step leaves, and `scale` the deviation of x_t there if that of the data is 1. r is 0 but where the
    variance is learned.
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


def make_table(schedule: NoiseSchedule, t: Column, a: Column, b: Column, c: Any = 0.0, **more: Any) -> SamplerTable:
    """The steps that leave the times `t`, in float64. Columns may be numbers, and r, d and e are 0 and f is 1 by default."""
    more = {"scale": np.hypot(*schedule.at(t)), "c": c, "r": 0.0, "e": 0.0, "f": 1.0} | more
    d = more.pop("d", np.zeros((len(t), MEMORY)))
    columns = {name: np.array(np.broadcast_to(column, len(t)), np.float64) for name, column in more.items()}
    return SamplerTable(t=t.astype(np.float64), a=np.array(a), b=np.array(b), d=d, **columns)


def sampling_times(
    schedule: NoiseSchedule, sampling_timesteps: int | None = None, spacing: str = "time", rho: float = 7.0
) -> Float[np.ndarray, " times"]:
    """T = t_S > ... > t_0 = 0, of which S = `sampling_timesteps`, by default T, are where the network is called.

    "time" spaces them evenly in t, rounded to rows; the others are real times, rounded to float32, the dtype that the network
    is told them in. "log_snr" spaces them evenly in log(sigma), sigma = noise / signal, and "karras" in sigma^(1 / rho)
    [Karras et al. 2022, eq. 5], down to t_1 = 1; where there is no signal at T, from the last row that has some. "flow" spaces
    them evenly in u = 1 / (1 + sigma^(-1 / 1.2)), which is near to t / T of rectified flow, so that sigma_1 falls with S.
    Raises ValueError on an unknown spacing, unless 1 <= S <= T, or if two times are one in float32.
    """
    check_choice("spacing", spacing, get_args(Spacing))
    rows = strided_timesteps(schedule.num_timesteps, sampling_timesteps)
    if spacing == "time" or len(rows) == 2:
        return rows.astype(np.float64)
    steps, sigma = len(rows) - 1, schedule.sigma[np.isfinite(schedule.sigma)]
    if spacing == "flow":
        first, last = 1 / (1 + schedule.sigma[[1, -1]] ** (-1 / FLOW_POWER))
        u = np.linspace(max(first, last / steps), last, steps)[:-1]
        sigmas = np.append((u / (1 - u)) ** FLOW_POWER, sigma[-1])
    elif spacing == "karras":
        sigmas = karras_sigmas(steps, sigma[1], sigma[-1], rho)
    else:
        sigmas = np.geomspace(sigma[1], sigma[-1], steps)
    times = schedule.time_of(sigmas[::-1]).astype(np.float32).astype(np.float64)
    times = np.concatenate([[schedule.num_timesteps], times[1:], [0.0]])
    if not np.all(np.diff(times) < 0):
        raise ValueError(f"{steps} times spaced in {spacing} are too close for float32: take fewer, or another spacing")
    return times


def strided_timesteps(num_timesteps: int, sampling_timesteps: int | None = None) -> Int[np.ndarray, " times"]:
    """T = t_S > ... > t_0 = 0, strictly decreasing and evenly spaced up to rounding; S = T if `sampling_timesteps` is None.

    Raises ValueError unless 1 <= sampling_timesteps <= num_timesteps.
    """
    steps = num_timesteps if sampling_timesteps is None else sampling_timesteps
    if not (1 <= steps <= num_timesteps and steps % 1 == 0):
        raise ValueError(f"sampling_timesteps must be between 1 and num_timesteps = {num_timesteps}, got {steps}")
    return np.rint(num_timesteps * np.arange(steps, -1, -1) / steps).astype(np.int32)


def as_times(schedule: NoiseSchedule, steps: Steps) -> Float[np.ndarray, " times"]:
    """The times that `steps` stands for. Raises ValueError unless they go strictly down to 0 from at most T."""
    if steps is None or np.ndim(steps) == 0:
        return sampling_times(schedule, steps)  # pyright: ignore[reportArgumentType]
    times = np.asarray(steps, np.float32).astype(np.float64)
    inside = times.ndim == 1 and len(times) > 1 and times[-1] == 0 and times[0] <= schedule.num_timesteps
    if not (inside and np.all(np.diff(times) < 0)):
        raise ValueError(f"times must go strictly down to 0, from at most T = {schedule.num_timesteps}, got {times}")
    return times


def ancestral_table(schedule: NoiseSchedule, sigma_type: str = "upper_bound", sampling_timesteps: Steps = None) -> SamplerTable:
    """Ancestral sampling: the posterior (eq. 7) at x_0_hat, strided if there are fewer than T steps [Ho et al. 2020, alg. 2].

    `sigma_type` is the variance c^2: "upper_bound" is that of x_s given x_t for x_0 ~ N(0, I), which is beta_{t|s} where the
    path preserves variance; "lower_bound" is the posterior's own, right for a single point x_0 [Ho et al. 2020, sec. 3.2];
    "zero" takes the posterior's mean (which is not DDIM); "learned" is between the two bounds, where the network says
    [Nichol & Dhariwal 2021, eq. 15], or else the lower bound. Raises ValueError on an unknown type or on steps outside 1..T.
    """
    check_choice("sigma_type", sigma_type, get_args(SigmaType))
    times = as_times(schedule, sampling_timesteps)
    t, s = times[:-1], times[1:]
    k, m, w, unknown = posterior_coefficients(schedule, t, s)
    variance = {"upper_bound": unknown, "zero": 0 * w}.get(sigma_type, w)
    log_range = np.log(unknown / np.where(s == 0, unknown, w)) / 2 if sigma_type == "learned" else 0.0
    return make_table(schedule, t, k, m, np.where(s == 0, 0.0, np.sqrt(variance)), r=log_range)


def ddim_table(schedule: NoiseSchedule, eta: float = 0.0, sampling_timesteps: Steps = None) -> SamplerTable:
    """DDIM [Song et al. 2021, eqs. 12, 16]: deterministic at eta = 0, lower-bound ancestral sampling at eta = 1.

        c = eta sqrt(w),   x_s = signal_s x_0_hat + sqrt(noise_s^2 - c^2) eps_hat + c z      (9)

    with eps_hat from eq. 5 and w from eq. 7. Raises ValueError on eta outside [0, 1] or steps outside 1..T.
    """
    return ddim_steps(schedule, as_times(schedule, sampling_timesteps), eta)


def ddim_steps(schedule: NoiseSchedule, times: Float[np.ndarray, " times"], eta: float = 0.0) -> SamplerTable:
    """DDIM through the times, which may also go up if eta = 0. Raises ValueError on eta outside [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    (signal_t, noise_t), (signal_s, noise_s) = schedule.at(times[:-1]), schedule.at(times[1:])
    variance = eta**2 * posterior_coefficients(schedule, times[:-1], times[1:])[2] if eta else 0.0
    a = np.sqrt(noise_s**2 - variance) / noise_t
    return make_table(schedule, times[:-1], a, signal_s - a * signal_t, np.sqrt(variance))


def padded(table: SamplerTable, num_steps: int) -> SamplerTable:
    """The same steps as a table of `num_steps` rows, so that samplers of any kind and length run in one compiled `sample`.

    Rows of zeros follow the last step: t = 0 ends a table there, though not in `sample_trajectory`, which takes every row.
    Raises ValueError if the table has more rows than that.
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
    """One x_0 of `shape` for each key, in memory that does not grow with the number of steps (eq. 8).

    The walk begins at `start`, an x_t at the table's first t, or at normal float32 noise of its `scale`, which is the
    deviation of x_t if that of the data is 1. Samples have start's dtype.
    Sample i depends on keys[i] and start[i] alone, whatever the batch size and the device count. The loop ends at the table's
    end or at its first row of t = 0, so it has no reverse-mode gradient; `sample_trajectory` has. Raises ValueError on a
    `start` of another shape or of integers.
    """
    begin = _start(table, keys, shape, start)
    table = _cast(table, begin)

    def step(carry):
        number, state = carry
        return number + 1, _step(denoise, jax.tree.map(lambda column: column[number], table), state, keys, number)

    def going_on(carry):
        return (carry[0] < len(table.t)) & (table.t[carry[0]] > 0)

    return jax.lax.while_loop(going_on, step, (0, _before_the_first_step(begin)))[1][0]


def sample_trajectory(
    denoise: Denoise,
    table: SamplerTable,
    keys: Key[Array, " B"],
    shape: tuple[int, ...],
    start: Float[Array, "B *shape"] | None = None,
) -> Float[Array, "times B *shape"]:
    """The same samples as `sample` with every x_t on the way: index 0 is x_0, the last is what the walk began with.

    Raises ValueError as `sample` does.
    """

    def step(state, numbered_row):
        number, row = numbered_row
        state = _step(denoise, row, state, keys, number)
        return state, state[0]

    begin = _start(table, keys, shape, start)
    _, path = jax.lax.scan(step, _before_the_first_step(begin), (jnp.arange(len(table.t)), _cast(table, begin)))
    return jnp.concatenate([begin[None], path])[::-1]


def _before_the_first_step(x_t: Array) -> tuple[Array, ...]:
    return (x_t, *[jnp.zeros_like(x_t)] * MEMORY)


def _step(denoise: Denoise, row: Any, state: tuple[Array, ...], keys: Array, number: Array) -> tuple[Array, ...]:
    """From (x_t, y_1, y_2, y_3) to (x_s, y, y_1, y_2)."""
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
    """The table in x's dtype, or in float32 where that has fewer bits."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jax.tree.map(lambda column: jnp.asarray(column, dtype), table)


def _start(table: SamplerTable, keys: Array, shape: tuple[int, ...], start: Array | None) -> Array:
    if start is None:
        return jnp.asarray(table.scale, jnp.float32)[0] * _normal(keys, 0, shape, jnp.float32)
    if start.shape != (len(keys), *shape):
        raise ValueError(f"start must have the shape {(len(keys), *shape)}, got {start.shape}")
    if not jnp.issubdtype(start.dtype, jnp.floating):
        raise ValueError(f"start must be of floating point, got {start.dtype}")
    return jnp.asarray(start)


def _normal(keys: Array, number: int | Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """The noise of the step of that number, from 1 on; 0 stands for the noise that sampling begins with."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape, dtype))(keys)
