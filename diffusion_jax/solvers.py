"""Higher-order solvers of the probability flow, each a table for the loop in `sampling.py` (docs/derivation.md).

In lambda = log(signal / noise) = -log(sigma), with h = lambda_s - lambda_t, the flow from t to s has the exact solution
[Lu et al. 2022]

    x_s = noise_s / noise_t x_t + signal_s (1 - e^-h) mean(x_0_hat),                (10)

where the mean is over theta = (lambda - lambda_t) / h from 0 to 1, with density proportional to e^(h theta). DDIM takes x_0_hat
at theta = 0. The solvers here put a polynomial through x_0_hat at several times, so the mean is a weighted sum with weights
known in advance. The last step, where h is infinite, is DDIM's. The order is lower in the first steps, which have few earlier
values, and in the last steps, where a higher order gains nothing.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from diffusion_jax.diffusion import check_choice
from diffusion_jax.sampling import MEMORY, SamplerTable, Steps, as_times, ddim_steps, make_table
from diffusion_jax.schedules import NoiseSchedule

LARGEST_RATIO = 10.0
NO_SIGNAL = 25.0  # without signal, lambda is -infinity: use this much less than the lowest finite lambda
POINTS, POINT_WEIGHTS = np.polynomial.legendre.leggauss(48)  # Gauss-Legendre quadrature on [-1, 1]


def dpm_solver_table(
    schedule: NoiseSchedule, eta: float = 0.0, sampling_timesteps: Steps = None, order: int = 2
) -> SamplerTable:
    """DPM-Solver++(2M) [Lu et al. 2022, alg. 2], or 3M with `order` 3. eta adds DDIM's noise; eta = 1 is the SDE form.

    Steps of order 2 evaluate the polynomial through two values of x_0_hat at the middle of the step, as in the paper. Steps of
    order 3 use the exact mean of the one through three. (Other implementations of 3M give the second difference half that
    weight and converge with order 2.) Raises ValueError on eta outside [0, 1], on an order other than 1, 2 or 3, or on steps
    outside 1..T.
    """
    return multistep_table(schedule, as_times(schedule, sampling_timesteps), eta, order)


def unipc_table(
    schedule: NoiseSchedule, sampling_timesteps: Steps = None, order: int = 2, variable: str = "log_snr"
) -> SamplerTable:
    """UniPC [Zhao et al. 2023, with B(h) = e^h - 1] of order 1, 2 or 3: x_0_hat at the end of each step corrects the step.

    The next step needs this x_0_hat anyway, so the correction costs no network call. The polynomial is in lambda, as in the
    paper, or for `variable` "signal" in 1 / sqrt(1 + sigma^2), in which x_0_hat is linear for data N(0, I). "signal" is better
    at few network calls with the spacing "flow". Do not use it with a spacing that puts many steps where there is little
    signal. Raises ValueError on an unknown variable or order, or on steps outside 1..T.
    """
    check_choice("variable", variable, ("log_snr", "signal"))
    return multistep_table(schedule, as_times(schedule, sampling_timesteps), 0.0, order, corrects=True, variable=variable)


def multistep_table(
    schedule: NoiseSchedule,
    times: Float[np.ndarray, " times"],
    eta: float,
    order: int,
    corrects: bool = False,
    variable: str = "log_snr",
) -> SamplerTable:
    """Steps through `times` that use x_0_hat at the last `order` times (eq. 10). The times may also increase if eta = 0."""
    _check_order(order)
    table, lambdas, signal = ddim_steps(schedule, times, eta), _lambda(schedule, times), schedule.at(times)[0]
    with np.errstate(divide="ignore"):  # e^-zeta = a signal_t / signal_s; zeta is h if eta = 0 and replaces h if eta > 0
        zeta = -np.log(table.a * signal[:-1] / signal[1:])
    zeta = np.where(np.isinf(zeta), np.diff(lambdas), zeta)
    coefficients, steps = np.zeros((len(table.t), 1 + MEMORY)), len(table.t)
    before = mean_before = np.empty(0)  # the first step does not use them
    for i in range(steps):
        nodes, mean = lambdas[_used(i, order, steps)], np.ones(1)
        if len(nodes) > 1:
            mean = _weights(nodes, lambdas[i : i + 2], zeta[i], variable)
        coefficients[i, : len(nodes)] = table.b[i] * mean
        if corrects and i > 0:
            corrected = _weights(np.append(lambdas[i], before), lambdas[i - 1 : i + 1], zeta[i - 1], variable)
            corrected[1:] -= mean_before
            coefficients[i, : len(corrected)] += table.a[i] * table.b[i - 1] * corrected
        before, mean_before = nodes, mean
    return table._replace(b=coefficients[:, 0], d=coefficients[:, 1:])


def deis_table(schedule: NoiseSchedule, sampling_timesteps: Steps = None, order: int = 3) -> SamplerTable:
    """DEIS [Zhang & Chen 2023, eq. 15, with polynomials in log(noise / signal)]: interpolates eps_hat instead of x_0_hat.

    With sigma = noise / signal, the flow is x_s / signal_s = x_t / signal_t + integral of eps_hat from sigma_t to sigma_s.
    Raises ValueError on an order other than 1, 2 or 3, or on steps outside 1..T.
    """
    _check_order(order)
    times = as_times(schedule, sampling_timesteps)
    table, lambdas = ddim_steps(schedule, times), _lambda(schedule, times)
    signal, noise = schedule.at(times)
    for i in range(1, len(table.t) - 1):
        nodes = lambdas[_used(i, order, len(table.t))]
        weights = _weights(nodes, lambdas[i : i + 2], lambdas[i] - lambdas[i + 1], exact=True)
        step = noise[i + 1] - signal[i + 1] * noise[i] / signal[i]
        table.a[i] += step * (weights[0] - 1) / noise[i]
        table.b[i] -= step * (weights[0] - 1) * signal[i] / noise[i]
        table.d[i, : len(nodes) - 1] = step * weights[1:]
    return table._replace(e=1 / noise[:-1], f=-signal[:-1] / noise[:-1])


def heun_table(
    schedule: NoiseSchedule,
    sampling_timesteps: Steps = None,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, np.inf),
    churn_noise: float = 1.0,
) -> SamplerTable:
    """Heun's method with `churn` [Karras et al. 2022, alg. 1-2]. A step is two rows, so two network calls; the last is one.

    The first row is DDIM's. The second replaces eps_hat by its mean over both ends. With ratio = sigma_s / sigma_t,

        x_s += signal_s (1 - ratio) / (2 ratio) (x_0_hat - x_0_hat_before)                              (11)

    A step with ratio <= 1 / 10 has no second row: from almost no signal, it would be all correction. Before a step from a sigma
    in `churn_range`, churn raises sigma by the factor 1 + min(churn / S, sqrt(2) - 1), at most to sigma_T. The preceding row
    adds that noise, times `churn_noise`, so the first step has no churn. Raises ValueError on a negative
    churn or on steps outside 1..T.
    """
    if not churn >= 0:
        raise ValueError(f"churn must be at least 0, got {churn}")
    times = as_times(schedule, sampling_timesteps)
    factor = 1 + min(churn / (len(times) - 1), np.sqrt(2) - 1)
    rows: list[list[Any]] = []  # t, a, b, c, d_1
    for t, s in pairwise(times):
        signal, noise = schedule.at(t)
        if churn and rows and churn_range[0] <= noise / signal <= churn_range[1]:
            t = float(np.float32(schedule.time_of(factor * noise / signal)))
            raised, high = schedule.at(t)
            up = raised / signal
            deviation = churn_noise * np.sqrt(max(high**2 - (up * noise) ** 2, 0.0))
            at, a, b, c, d = rows[-1]
            rows[-1] = [at, up * a, up * b, float(np.hypot(up * c, deviation)), up * d]
            signal, noise = raised, high
        signal_s, noise_s = schedule.at(s)
        rows.append([t, noise_s / noise, signal_s - noise_s / noise * signal, 0.0, 0.0])
        if noise * signal_s < LARGEST_RATIO * signal * noise_s:
            weight = (signal_s**2 * noise / (signal * noise_s) - signal_s) / 2
            rows.append([s, 1.0, weight, 0.0, -weight])
    t, a, b, c, d = np.array(rows).T
    return make_table(schedule, t, a, b, c, d=np.pad(d[:, None], [(0, 0), (0, MEMORY - 1)]))


def _check_order(order: int) -> None:
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")


def _lambda(schedule: NoiseSchedule, times: Float[np.ndarray, " times"]) -> Float[np.ndarray, " times"]:
    signal, noise = schedule.at(times)
    with np.errstate(divide="ignore"):
        lambdas = np.log(signal) - np.log(noise)
    lowest = lambdas[np.isfinite(lambdas)].min(initial=0.0)
    return np.where(np.isneginf(lambdas), lowest - NO_SIGNAL, lambdas)


def _used(i: int, order: int, steps: int) -> Int[np.ndarray, " used"]:
    """The steps whose x_0_hat step i uses, its own first: `order` of them, but fewer near both ends of the table."""
    return i - np.arange(min(order, i + 1, steps - i))


def _weights(nodes: np.ndarray, step: np.ndarray, zeta: float, variable: str = "log_snr", exact: bool = False) -> np.ndarray:
    """Weights l such that sum_j l_j P(node_j) is the mean of P over the step with density e^(zeta theta) (eq. 10).

    P is any polynomial in `variable` of degree below len(nodes); `nodes` and the ends of `step` are values of lambda. For two
    nodes in lambda, unless `exact`, the value in the middle of the step replaces the mean, as in UniPC's and 2M's papers.
    """
    theta, powers = (1 + POINTS) / 2, np.arange(len(nodes))
    density = POINT_WEIGHTS * np.exp(zeta * theta - max(zeta, 0))
    place = np.asarray if variable == "log_snr" else lambda lambdas: 1 / np.sqrt(1 + np.exp(-2 * lambdas))
    begin, end = place(step)
    points, nodes = ((place(lambdas) - begin) / (end - begin) for lambdas in (step[0] + theta * (step[1] - step[0]), nodes))
    moments = density @ points[:, None] ** powers / density.sum()
    if len(nodes) == 2 and variable == "log_snr" and not exact:
        moments[1] = 1 / 2
    return np.linalg.solve(nodes[None, :] ** powers[:, None], moments)
