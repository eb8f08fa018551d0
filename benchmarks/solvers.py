"""Deterministic solvers and grids on data whose best denoiser is known: how far are samples of 5, 10 and 20 network calls?

    python benchmarks/solvers_diffusers.py diffusers.json     # once, in any Python that has diffusers
    python benchmarks/solvers.py diffusers.json [path] [data sets]

prints Markdown, for this project's solvers on its grids and for the best of diffusers' (chosen afterwards, for each data set
and number of calls). Of each it gives the sliced Wasserstein-2 distance of 20,000 samples from as many fresh data, mean and
deviation of three seeds, which even for perfect samples is that of data from other data; and after a comma the distance from
the ends of the probability flow from the same normal draws, which for perfect samples is 0. `path` is the schedule of this
project: cosine, as diffusers', or linear, flow or exploding. The network makes no error: what is left is solver and grid.

Beside what the library has, it measures a candidate for a default: `even_times` and `cosine_unipc_table`.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from solvers_problem import CALLS, SEEDS, Mixture, T, data_sets, distance, distances, fresh, problem

import diffusion_jax as dj

SOLVERS = {
    "DDIM": dj.ddim_table,
    **{f"DPM++ {order}": partial(dj.dpm_solver_table, order=order) for order in (2, 3)},
    **{f"UniPC {order}": partial(dj.unipc_table, order=order) for order in (2, 3)},
    **{f"DEIS {order}": partial(dj.deis_table, order=order) for order in (2, 3)},
    "Heun": dj.heun_table,
}
SCHEDULES = {
    "cosine": dj.cosine_schedule,
    "linear": dj.linear_schedule,
    "flow": dj.flow_schedule,
    "exploding": dj.variance_exploding_schedule,
}
POWER = 1.2


def even_times(schedule: dj.NoiseSchedule, steps: int, power: float = POWER) -> np.ndarray:
    """From T to 0 even in u = r / (1 + r), r = sigma^(1 / power); but t_1 is at least 1.

    u is about 1 without signal, 1/2 at as much noise as data of deviation 1, and 0 at the data. Even steps in it end with ever
    less noise, sigma_1 = (1 / (S - 1))^power, as S grows.
    """
    with np.errstate(divide="ignore"):
        u = 1 / (1 + schedule.sigma ** (-1 / power))
    u = np.linspace(u[-1], max(u[1], u[-1] / steps), steps)[1:]
    times = schedule.time_of((u / (1 - u)) ** power)
    return np.concatenate([[schedule.num_timesteps], times, [0.0]]).astype(np.float32).astype(np.float64)


def cosine_unipc_table(schedule: dj.NoiseSchedule, times: np.ndarray, order: int = 3) -> dj.SamplerTable:
    """UniPC with x_0_hat a polynomial in w = 1 / sqrt(1 + sigma^2) in place of lambda; the last step still ends at x_0_hat.

    For normal data of deviation 1, x_0_hat is linear in w along the flow, so two nodes leave no error. And w is 0 without
    signal, where lambda is infinite, so a call there is a node like any other. A step to s adds noise_s (q_s - q_t) times the
    mean of x_0_hat over q = 1 / sigma.
    """
    table = dj.ddim_table(schedule, sampling_timesteps=times)
    signal, noise = schedule.at(times)
    with np.errstate(divide="ignore"):
        q = signal / noise
    w = signal / np.hypot(signal, noise)
    coefficients, before = np.zeros((len(table.t), 4)), None
    for i in range(len(table.t)):
        nodes = i - np.arange(min(order, i + 1, len(table.t) - i))
        mean = _weights(w[nodes], w[i], w[i + 1], q[i], q[i + 1])
        coefficients[i, : len(nodes)] = table.b[i] * mean
        if before is not None:  # the step before, corrected by x_0_hat at its end
            corrected = _weights(w[np.append(i, before[0])], w[i - 1], w[i], q[i - 1], q[i])
            corrected[1:] -= before[1]
            coefficients[i, : len(corrected)] += table.a[i] * table.b[i - 1] * corrected
        before = nodes, mean
    return table._replace(b=coefficients[:, 0], d=coefficients[:, 1:])


def _weights(nodes: np.ndarray, w_t: float, w_s: float, q_t: float, q_s: float) -> np.ndarray:
    """c with sum_j c_j P(w_j) = the mean of P(w) over q from q_t to q_s, for polynomials P of degree < n."""
    if len(nodes) == 1:
        return np.ones(1)
    points, density = np.polynomial.legendre.leggauss(48)
    x = np.arcsinh(q_t) + (np.arcsinh(q_s) - np.arcsinh(q_t)) * (1 + points) / 2  # q = sinh(x), w = tanh(x)
    density = density * np.cosh(x) / np.cosh(x[-1])
    theta, powers = (np.tanh(x) - w_t) / (w_s - w_t), np.arange(len(nodes))
    moments = density @ theta[:, None] ** powers / density.sum()
    return np.linalg.solve(((nodes - w_t) / (w_s - w_t)) ** powers[:, None], moments)


def walk(table: dj.SamplerTable, schedule: dj.NoiseSchedule, data: Mixture, x: np.ndarray) -> np.ndarray:
    """Eq. 8 in float64, without noise."""
    x, kept = table.scale[0] * x, [np.zeros_like(x)] * 3
    for t, _, a, b, _, _, d, e, f in zip(*table, strict=True):
        signal, noise = schedule.at(t)
        x_0_hat = data.best_x_0_hat(x / signal if signal > 0 else x, noise / signal if signal > 0 else np.inf)
        y = e * x + f * x_0_hat
        x = a * x + b * x_0_hat + sum(weight * before for weight, before in zip(d, kept, strict=True))
        kept = [y, *kept[:2]]
    return x


def tables(schedule: dj.NoiseSchedule, calls: int) -> dict[tuple[str, str], dj.SamplerTable]:
    """By solver and grid. Heun's S steps take 2 S - 1 calls, so it makes one fewer where `calls` is even."""
    grids = {name: partial(dj.sampling_times, schedule, spacing=name) for name in ("time", "log_snr", "karras")}
    grids["even"] = partial(even_times, schedule)
    result = {}
    for grid, times in grids.items():
        for solver, make_table in SOLVERS.items():
            steps = (calls + 1) // 2 if solver == "Heun" else calls
            result[solver, grid] = make_table(schedule, sampling_timesteps=times(steps))
        result["cosine UniPC 3", grid] = cosine_unipc_table(schedule, times(calls))
    result["UniPC 3", "even, power 1"] = dj.unipc_table(schedule, even_times(schedule, calls, 1.0), order=3)
    return result


def cell(found: list[tuple[float, float]]) -> str:
    """The distance from the data, mean and deviation over the seeds, then the mean of that from the flow."""
    from_data, from_flow = np.array(found).T
    return f"{from_data.mean():.4f} ± {from_data.std():.4f}, {from_flow.mean():.4f}"


def main(diffusers: str, path: str = "cosine", *names: str) -> None:
    schedule = SCHEDULES[path](T)
    theirs = {tuple(key.split("|")): found for key, found in json.loads(Path(diffusers).read_text()).items()}
    for name in names or data_sets():
        data = data_sets()[name]
        seeds = [problem(data, seed) for seed in SEEDS]
        floor = [distance(fresh(data, 10 + 2 * i), fresh(data, 11 + 2 * i)) for i in range(6)]
        exact = [distance(ends, against) for _, against, ends in seeds]
        columns: dict[tuple[str, str], list[str]] = {}
        for calls in CALLS:
            for measure, kind in enumerate(("data", "flow")):
                best = min(
                    (np.mean([pair[measure] for pair in found]), key[2:], found)
                    for key, found in theirs.items()
                    if key[:2] == (name, str(calls))
                )
                columns.setdefault((f"best of diffusers by {kind}", ""), []).append(f"{cell(best[2])} ({', '.join(best[1])})")
            for key, table in tables(schedule, calls).items():
                found = [distances(walk(table, schedule, data, x), *against) for x, *against in seeds]
                columns.setdefault(key, []).append(cell(found))
        print(f"\n{name}, {path}: data from data {np.mean(floor):.4f} ± {np.std(floor):.4f}, ", end="")
        print(f"the flow itself from data {np.mean(exact):.4f} ± {np.std(exact):.4f}\n")
        print("| solver | grid | " + " | ".join(f"{calls} calls" for calls in CALLS) + " |\n" + "|---" * (2 + len(CALLS)) + "|")
        for (solver, grid), column in columns.items():
            print(f"| {solver} | {grid} | " + " | ".join(column) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
