"""One contender in a process of its own: python contenders.py NAME '{"embed_dim": 32, ...}', asked through standard input.

It answers each line with one line of JSON:

    train [N] | forward | sample COUNT STEPS | matmul    the seconds that it took, the device's work included
    flops                                                of one forward pass, counted in the layers
    lowered                                              XLA's count of a training step for CUDA, before it optimizes anything
    memory                                               the most bytes held: of the device's memory, or of the process on a CPU
    difference N                                         the largest difference of parameters after N training steps, made twice
    rates                                                of the machine: products and additions, and bytes of memory, a second
"""

import importlib
import json
import math
import resource
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

T = 500
SIDE = 32
MATMUL = 2048
CHANNELS = (1, 2, 4, 8)
Contender = dict[str, Callable[..., Any]]
"""What can be asked, by name."""


def timed(work: Callable) -> Callable[..., float]:
    def seconds(*args: int) -> float:
        start = time.perf_counter()
        work(*args)
        return time.perf_counter() - start

    return seconds


def ours(options: dict, precision: str, products: str | None = None) -> Contender:
    """This project, as experiments/mnist.py runs it; `products` is JAX's precision of float32 products."""
    from support.machine import prepare_machine

    prepare_machine()
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    import diffusion_jax as dj
    from support import model, objective
    from support.batches import training_step
    from support.config import PRESETS
    from support.data import ImageData

    jax.config.update("jax_default_matmul_precision", products)
    size = {"embed_dim": options["embed_dim"], "batch_size": options["batch_size"]}
    size["dim_scales"] = tuple(options.get("dim_scales", CHANNELS))
    config = dataclasses.replace(PRESETS["paper"], precision=precision, num_timesteps=T, **size)
    schedule, (init_key, train_key, sample_key) = dj.cosine_schedule(T), jax.random.split(jax.random.key(0), 3)
    images = np.random.default_rng(0).integers(0, 256, (60_000, 28, 28, 1), np.uint8)
    state = model.initial_state(config, init_key)
    step = objective.make_step(config, schedule, ImageData("noise", images, np.zeros(len(images), np.int32)), train_key)
    draw = model.make_sampler(config, schedule)
    network = model.make_network(config)
    apply = jax.jit(lambda params, x_t, t: network.apply({"params": params}, x_t, t))
    x_t, t = jnp.zeros((options["batch_size"], SIDE, SIDE, 1)), jnp.ones(options["batch_size"], jnp.int32)
    square = jax.random.normal(init_key, (MATMUL, MATMUL), model.DTYPES[precision])
    multiply = jax.jit(jnp.matmul)

    def train(steps: int = 1) -> None:
        nonlocal state
        for number in range(steps):
            state, _ = step(state, number)
        jax.block_until_ready(state)

    def sample(count: int, steps: int) -> None:
        draw(
            state.params,
            dj.ancestral_table(schedule, sampling_timesteps=steps),
            sample_key,
            model.labels_in_turn(config, count),
        )

    def difference(steps: int) -> float:
        runs = []
        for _ in range(2):
            run = model.initial_state(config, init_key)
            for number in range(steps):
                run, _ = step(run, number)
            runs.append(jax.device_get(run.params))
        return float(max(np.abs(one - other).max() for one, other in zip(*map(jax.tree.leaves, runs), strict=True)))

    def memory() -> int:
        statistics = jax.devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else memory_of_process()

    def flops() -> int:
        layers = jax.make_jaxpr(lambda params: network.apply({"params": params}, x_t, t))
        return flops_of(layers(state.params).jaxpr)

    def lowered() -> dict[str, float]:
        step = training_step(objective.make_loss(config, schedule), train_key, options["batch_size"], 0.0)
        whole = partial(step, mean_over_devices=lambda tree: tree)
        indices = jnp.zeros(options["batch_size"], jnp.int32)
        traced = jax.jit(whole).trace(state, (images, np.zeros(len(images), np.int32)), indices, indices)
        count = traced.lower(lowering_platforms=("cuda",)).cost_analysis()
        return {name: count[name] for name in ("flops", "bytes accessed")}

    return {
        "train": timed(train),
        "forward": timed(lambda: apply(state.params, x_t, t).block_until_ready()),
        "sample": timed(sample),
        "matmul": timed(lambda: multiply(square, square).block_until_ready()),
        "flops": flops,
        "lowered": lowered,
        "memory": memory,
        "difference": difference,
    }


def flops_of(jaxpr) -> int:
    """Two for each multiplication and addition of the products and convolutions in a program, before any compiler saw it."""
    total = 0
    for equation in jaxpr.eqns:
        out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "dot_general":
            shape, (contracted, _) = equation.invars[0].aval.shape, equation.params["dimension_numbers"][0]
            total += 2 * out * math.prod(shape[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
            total += 2 * out * math.prod(kernel) // kernel[numbers[0]]
        branches = equation.params.get("branches", ())  # of one operation, for each platform
        for value in (*branches[-1:], *equation.params.values()):
            inner = getattr(value, "jaxpr", value)
            total += flops_of(inner) if hasattr(inner, "eqns") else 0
    return total


def memory_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(options: dict) -> Contender:
    """The device's own rates: the best of several sizes, each the best of five timings of ten runs."""
    import jax
    import jax.numpy as jnp

    def best(work: Callable, amount: float, *args: Any) -> float:
        jax.block_until_ready(work(*args))
        timings = [timed(lambda: jax.block_until_ready([work(*args) for _ in range(10)]))() / 10 for _ in range(5)]
        return amount / min(timings)

    def rates() -> dict[str, float]:
        multiply, add_one = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
        result = {}
        for name, dtype in (("bfloat16", jnp.bfloat16), ("TF32", jnp.float32)):
            squares = [jax.random.normal(jax.random.key(0), (size, size), dtype) for size in options["matmul_sizes"]]
            result[name] = max(best(multiply, 2 * len(x) ** 3, x, x) for x in squares)
        x = jnp.zeros(options["bandwidth_bytes"] // 4, jnp.float32)
        return result | {"bandwidth": best(add_one, 2 * x.nbytes, x), "device": jax.devices()[0].device_kind}

    return {"rates": rates}


def pytorch(options: dict, name: str, **how: Any) -> Contender:
    import contenders_torch

    return getattr(contenders_torch, name)(options, **how)


CONTENDERS = {
    "machine": machine,
    "ours, float32": partial(ours, precision="float32", products="highest"),
    "ours, TF32": partial(ours, precision="float32"),
    "ours, bfloat16": partial(ours, precision="bfloat16"),
    "original, as it is": partial(pytorch, name="original", tuned=False),
    "original, tuned": partial(pytorch, name="original"),
    "original, tuned, torch.compile": partial(pytorch, name="original", mode="default"),
    "original, tuned, bfloat16": partial(pytorch, name="original", autocast=True),
    "original, tuned, torch.compile, bfloat16": partial(pytorch, name="original", mode="default", autocast=True),
    "original, tuned, CUDA graphs, bfloat16": partial(pytorch, name="original", mode="reduce-overhead", autocast=True),
    "diffusers UNet2DModel, tuned": partial(pytorch, name="diffusers"),
}


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    importlib.import_module("jax" if name.startswith(("ours", "machine")) else "torch")  # while others are at work
    contender = None
    for line in sys.stdin:
        command, *args = line.split()
        try:
            contender = contender or CONTENDERS[name](options)
            answer = contender[command](*map(int, args))
        except Exception as problem:
            answer = {"error": (str(problem) or type(problem).__name__).splitlines()[0][:300]}
            traceback.print_exc()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
