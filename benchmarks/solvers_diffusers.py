"""The part of solvers.py that needs diffusers: its deterministic multistep schedulers on all their grids.

    python benchmarks/solvers_diffusers.py OUT.json [data sets]

runs in any Python that has diffusers, torch and scipy; the project is not imported. It writes, for each data set, number of
calls, scheduler and grid, the two distances for each seed. A scheduler is stepped through its own sigmas with the best denoiser
there. Two changes make its classes work in float64: the table of sigmas, which they store in float32, is cast to float64, and
the name torch.float32, to which DPMSolverMultistepScheduler casts the sample, stands for torch.float64.
"""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep
from solvers_problem import CALLS, SEEDS, Mixture, T, data_sets, distances, problem

BASE = {"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
SCHEDULERS = {
    **{f"UniPC {order}": ("UniPCMultistepScheduler", {"solver_order": order, "solver_type": "bh2"}) for order in (2, 3)},
    **{
        f"DPM++ {order}{' Euler' * euler}": (
            "DPMSolverMultistepScheduler",
            {"solver_order": order, "solver_type": "midpoint", "algorithm_type": "dpmsolver++", "euler_at_final": euler},
        )
        for order in (2, 3)
        for euler in (False, True)
    },
    **{f"DEIS {order}": ("DEISMultistepScheduler", {"solver_order": order}) for order in (2, 3)},
}
GRIDS = {
    **{name: {"timestep_spacing": name} for name in ("linspace", "leading", "trailing")},
    **{name: {f"use_{name}": True} for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")},
}


class Torch64:
    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


def run(scheduler, calls: int, data: Mixture, x: np.ndarray) -> np.ndarray:
    scheduling_dpmsolver_multistep.torch = torch
    scheduler.set_timesteps(calls)
    assert len(scheduler.timesteps) == calls
    scheduling_dpmsolver_multistep.torch = Torch64()
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.set_begin_index(0)
    sample = torch.from_numpy(x)
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        x_0_hat = torch.from_numpy(data.best_x_0_hat(sample.numpy() * np.sqrt(1 + sigma**2), sigma))
        sample = scheduler.step(x_0_hat, t, sample).prev_sample
        assert sample.dtype == torch.float64
    return sample.numpy()


def main(out: str, *names: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    results = {}
    for name in names or data_sets():
        data = data_sets()[name]
        seeds = [problem(data, seed) for seed in SEEDS]
        for calls in CALLS:
            for solver, (cls, options) in SCHEDULERS.items():
                for grid, grid_options in GRIDS.items():
                    if grid == "lu_lambdas" and not solver.startswith("DPM++"):
                        continue  # it does not have this grid
                    scheduler = getattr(diffusers, cls)(**BASE, **options, **grid_options)
                    try:
                        found = [distances(run(scheduler, calls, data, x), *against) for x, *against in seeds]
                    except (torch.linalg.LinAlgError, AssertionError) as error:
                        print(f"{solver}, {grid}, {calls} calls: {error!r}", file=sys.stderr)
                        continue
                    results[f"{name}|{calls}|{solver}|{grid}"] = found
            Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
