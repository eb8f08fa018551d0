"""Sampling: every sampler is a table of affine steps, and one loop runs any of them (docs/derivation.md).

A sampler walks down timesteps T = t_S > ... > t_0 = 0. Each of its S steps goes from t to the next lower s:

    x_0_hat = denoise(x_t, t)
    x_s     = a x_t + b x_0_hat + c z + d x_0_hat_before,  z ~ N(0, I)              (11)

where x_0_hat_before is the previous step's x_0_hat (0 at the first step), and a, b, c and d are known before the network is
called. The last step adds no noise: it ends at x_0_hat. A network that learns its variance gives, beside x_0_hat, a fraction f
of the way from the least deviation to the largest, in log space; then c e^(r f) stands for c, and r is known as well.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, Key

from diffusion_jax.diffusion import Denoise, _check_choice, posterior_coefficients, with_fraction
from diffusion_jax.schedules import NoiseSchedule

SigmaType = Literal["upper_bound", "lower_bound", "zero", "learned"]


class SamplerTable(NamedTuple):
    """The coefficients of eq. 11, a row a step, first step first; `t` is the timestep that the step leaves.

    r is 0 but where the variance is learned.
    """

    t: Int[np.ndarray, " S"]
    a: Float[np.ndarray, " S"]
    b: Float[np.ndarray, " S"]
    c: Float[np.ndarray, " S"]
    d: Float[np.ndarray, " S"]
    r: Float[np.ndarray, " S"]


def strided_timesteps(num_timesteps: int, sampling_timesteps: int | None = None) -> Int[np.ndarray, " times"]:
    """T = t_S > ... > t_0 = 0, strictly decreasing and evenly spaced up to rounding; S = T if `sampling_timesteps` is None.

    Raises ValueError unless 1 <= sampling_timesteps <= num_timesteps.
    """
    steps = num_timesteps if sampling_timesteps is None else sampling_timesteps
    if not (1 <= steps <= num_timesteps and steps % 1 == 0):
        raise ValueError(f"sampling_timesteps must be between 1 and num_timesteps = {num_timesteps}, got {steps}")
    return np.rint(num_timesteps * np.arange(steps, -1, -1) / steps).astype(np.int32)


def ancestral_table(
    schedule: NoiseSchedule, sigma_type: str = "upper_bound", sampling_timesteps: int | None = None
) -> SamplerTable:
    """Ancestral sampling: the posterior (eq. 10) at x_0_hat, strided if `sampling_timesteps` < T [Ho et al. 2020, alg. 2].

    `sigma_type` is the variance c^2: "upper_bound" is beta_{t|s}, right for x_0 ~ N(0, I); "lower_bound" is the posterior's
    own, right for a single point x_0 [Ho et al. 2020, sec. 3.2]; "zero" takes the posterior's mean (which is not DDIM);
    "learned" is between the two bounds, where the network says [Nichol & Dhariwal 2021, eq. 15], or else the lower bound.
    Raises ValueError on an unknown type or on `sampling_timesteps` outside 1..T.
    """
    _check_choice("sigma_type", sigma_type, get_args(SigmaType))
    times = strided_timesteps(schedule.num_timesteps, sampling_timesteps)
    t, s = times[:-1], times[1:]
    k, m, w = posterior_coefficients(schedule, t, s)
    beta = 1 - schedule.alpha_bar[t] / schedule.alpha_bar[s]
    zero, ends = np.zeros_like(k), s == 0
    variance = {"upper_bound": beta, "zero": zero}.get(sigma_type, w)
    log_range = np.log(beta / np.where(ends, beta, w)) / 2 if sigma_type == "learned" else zero
    return SamplerTable(t, k, m, np.where(ends, 0.0, np.sqrt(variance)), zero, log_range)


def ddim_table(schedule: NoiseSchedule, eta: float = 0.0, sampling_timesteps: int | None = None) -> SamplerTable:
    """DDIM [Song et al. 2021, eqs. 12, 16]: deterministic at eta = 0, lower-bound ancestral sampling at eta = 1.

        c = eta sqrt(w),   x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s - c^2) eps_hat + c z      (12)

    with eps_hat from eq. 7 and w from eq. 10. Raises ValueError on eta outside [0, 1] or `sampling_timesteps` outside 1..T.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    times = strided_timesteps(schedule.num_timesteps, sampling_timesteps)
    t, s = times[:-1], times[1:]
    variance = eta**2 * posterior_coefficients(schedule, t, s)[2]
    a = np.sqrt(schedule.sqrt_one_minus_alpha_bar[s] ** 2 - variance) / schedule.sqrt_one_minus_alpha_bar[t]
    b = schedule.sqrt_alpha_bar[s] - a * schedule.sqrt_alpha_bar[t]
    zero = np.zeros_like(a)
    return SamplerTable(t, a, b, np.sqrt(variance), zero, zero)


def dpm_solver_table(schedule: NoiseSchedule, eta: float = 0.0, sampling_timesteps: int | None = None) -> SamplerTable:
    """DPM-Solver++(2M) [Lu et al. 2022, alg. 2]: of second order, where DDIM is of first; at eta = 1 its SDE form (its app.).

    It takes DDIM's step from x_0_hat extrapolated to the middle of the step, along the line through the last two in
    lambda_t = log(sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t)), with h = lambda_s - lambda_t, and DDIM's noise for any eta:

        D = x_0_hat + (x_0_hat - x_0_hat_before) h / (2 h_before)                                           (13)

    The first step, which has nothing before it, and the last, where h is infinite, are DDIM's own. Raises ValueError on eta
    outside [0, 1] or `sampling_timesteps` outside 1..T.
    """
    table = ddim_table(schedule, eta, sampling_timesteps)
    t, b, d = table.t, table.b, np.zeros_like(table.b)
    h = np.diff(np.log(schedule.sqrt_alpha_bar[t] / schedule.sqrt_one_minus_alpha_bar[t]))  # of all steps but the last
    d[1:-1] = -b[1:-1] * h[1:] / (2 * h[:-1])
    return table._replace(b=b - d, d=d)


def padded(table: SamplerTable, num_steps: int) -> SamplerTable:
    """The same steps as a table of `num_steps` rows, so that samplers of any kind and length run in one compiled `sample`.

    Rows of zeros follow the last step: t = 0 ends a table there, though not in `sample_trajectory`, which takes every row.
    Raises ValueError if the table has more rows than that.
    """
    missing = num_steps - len(table.t)
    if missing < 0:
        raise ValueError(f"num_steps must be at least the table's {len(table.t)} steps, got {num_steps}")
    return SamplerTable(*(np.pad(column, (0, missing)) for column in table))


def sample(
    denoise: Denoise,
    table: SamplerTable,
    keys: Key[Array, " B"],
    shape: tuple[int, ...],
    start: Float[Array, "B *shape"] | None = None,
) -> Float[Array, "B *shape"]:
    """One x_0 of `shape` for each key, in memory that does not grow with the number of steps (eq. 11).

    The walk begins at `start`, an x_t at the table's first t, or at standard normal float32 noise. Samples have start's dtype.
    Sample i depends on keys[i] and start[i] alone, whatever the batch size and the device count. The loop ends at the table's
    end or at its first row of t = 0, so it has no reverse-mode gradient; `sample_trajectory` has. Raises ValueError on a
    `start` of another shape or of integers.
    """
    begin = _start(keys, shape, start)
    table = _cast(table, begin)

    def step(carry):
        number, state = carry
        return number + 1, _step(denoise, jax.tree.map(lambda column: column[number], table), state, keys, number)

    going_on = lambda carry: (carry[0] < len(table.t)) & (table.t[carry[0]] > 0)  # noqa: E731
    return jax.lax.while_loop(going_on, step, (0, (begin, jnp.zeros_like(begin))))[1][0]


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

    def step(carry, numbered_row):
        number, row = numbered_row
        carry = _step(denoise, row, carry, keys, number)
        return carry, carry[0]

    begin = _start(keys, shape, start)
    _, path = jax.lax.scan(step, (begin, jnp.zeros_like(begin)), (jnp.arange(len(table.t)), _cast(table, begin)))
    return jnp.concatenate([begin[None], path])[::-1]


def _step(denoise: Denoise, row: Any, carry: tuple[Array, Array], keys: Array, number: Array) -> tuple[Array, Array]:
    """From (x_t, x_0_hat_before) to (x_s, x_0_hat)."""
    x_t, x_0_hat_before = carry
    x_0_hat, fraction = with_fraction(denoise(x_t, jnp.full(len(x_t), row.t, jnp.int32)))
    deviation = row.c * jnp.exp(row.r * fraction)
    noise = _normal(keys, number + 1, x_t.shape[1:], row.c.dtype)
    x_s = row.a * x_t + row.b * x_0_hat + deviation * noise + row.d * x_0_hat_before
    return x_s.astype(x_t.dtype), x_0_hat.astype(x_t.dtype)


def _cast(table: SamplerTable, x: Array) -> Any:
    """The table in x's dtype, or in float32 where that has fewer bits."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jax.tree.map(lambda column: jnp.asarray(column, dtype), table)._replace(t=jnp.asarray(table.t, jnp.int32))


def _start(keys: Array, shape: tuple[int, ...], start: Array | None) -> Array:
    if start is None:
        return _normal(keys, 0, shape, jnp.float32)
    if start.shape != (len(keys), *shape):
        raise ValueError(f"start must have the shape {(len(keys), *shape)}, got {start.shape}")
    if not jnp.issubdtype(start.dtype, jnp.floating):
        raise ValueError(f"start must be of floating point, got {start.dtype}")
    return jnp.asarray(start)


def _normal(keys: Array, number: int | Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """The noise of the step of that number, from 1 on; 0 stands for the noise that sampling begins with."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape, dtype))(keys)
