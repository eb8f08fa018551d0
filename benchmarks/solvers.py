"""Deterministic solvers and grids on data whose best denoiser is known: how far are samples of 5, 10 and 20 network calls?

    python benchmarks/solvers_diffusers.py diffusers.json     # once, in any Python that has diffusers
    python benchmarks/solvers.py diffusers.json [path] [data sets]

prints Markdown, for this project's solvers on its grids and for the best of diffusers' (chosen afterwards, for each data set
and number of calls). Of each it gives the sliced Wasserstein-2 distance of 20,000 samples from as many fresh data, mean and
deviation of three seeds, whose floor is the distance of data from other data; and after a comma the distance from
the ends of the probability flow from the same normal draws, which for perfect samples is 0. `path` is the schedule of this
project: cosine, as diffusers', or linear, flow or exploding. The network makes no error: what is left is solver and grid.
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
    **{f"UniPC {order} in the signal": partial(dj.unipc_table, order=order, variable="signal") for order in (2, 3)},
    **{f"DEIS {order}": partial(dj.deis_table, order=order) for order in (2, 3)},
    "Heun": dj.heun_table,
}
SCHEDULES = {
    "cosine": dj.cosine_schedule,
    "linear": dj.linear_schedule,
    "flow": dj.flow_schedule,
    "exploding": dj.variance_exploding_schedule,
}


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
    grids = {name: partial(dj.sampling_times, schedule, spacing=name) for name in ("time", "log_snr", "karras", "flow")}
    result = {}
    for grid, times in grids.items():
        for solver, make_table in SOLVERS.items():
            steps = (calls + 1) // 2 if solver == "Heun" else calls
            result[solver, grid] = make_table(schedule, sampling_timesteps=times(steps))
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
