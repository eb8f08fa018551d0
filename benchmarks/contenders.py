"""One contender in a process of its own: python contenders.py NAME '{"embed_dim": 32, ...}', asked through standard input.

It says when its first training step is done, then answers each line with the seconds that the work on it took:

    train | forward | sample S | matmul

or with flops, of one forward pass, or memory, the most bytes that the process has held.
"""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

T = 500
SIDE = 32
MATMUL = 2048
CHANNELS = (1, 2, 4, 8)


class Contender(NamedTuple):
    """What can be timed: functions that return once their work is done."""

    train: Callable[[], Any]
    forward: Callable[[], Any]
    sample: Callable[[int], Any] | None
    matmul: Callable[[], Any]
    flops: Callable[[], int]
    """Of one forward pass, counted in the network's layers."""


def ours(options: dict, precision: str) -> Contender:
    """This project, as experiments/mnist.py runs it."""
    from machine import keep_freed_memory

    keep_freed_memory()
    import dataclasses

    import jax
    import jax.numpy as jnp
    import mnist
    import numpy as np

    import diffusion_jax as dj
    from diffusion_jax.data import ImageData

    size = {"embed_dim": options["embed_dim"], "dim_scales": CHANNELS, "batch_size": options["batch_size"]}
    config = dataclasses.replace(mnist.PRESETS["paper"], precision=precision, num_timesteps=T, **size)
    schedule, key = dj.cosine_schedule(T), jax.random.key(0)
    state = mnist.initial_state(config, key)
    images = np.random.default_rng(0).integers(0, 256, (1000, 28, 28, 1), np.uint8)
    step = mnist.make_step(config, schedule, ImageData("noise", images, np.zeros(1000, np.int64)), key)
    draw = mnist.make_sampler(config, schedule)
    network = mnist.make_network(config)
    apply = jax.jit(lambda params, x_t, t: network.apply({"params": params}, x_t, t))
    x_t, t = jnp.zeros((options["batch_size"], SIDE, SIDE, 1)), jnp.ones(options["batch_size"], jnp.int32)
    square = jax.random.normal(key, (MATMUL, MATMUL), mnist.DTYPES[precision])
    multiply = jax.jit(jnp.matmul)

    def train():
        nonlocal state
        state = jax.block_until_ready(step(state, 0)[0])

    def sample(steps: int):
        labels = mnist.labels_in_turn(config, options["num_samples"])
        draw(state.ema_params, dj.ancestral_table(schedule, sampling_timesteps=steps), key, labels)

    forward = lambda: apply(state.params, x_t, t).block_until_ready()  # noqa: E731
    matmul = lambda: multiply(square, square).block_until_ready()  # noqa: E731
    layers = lambda params: network.apply({"params": params}, x_t, t)  # noqa: E731
    return Contender(train, forward, sample, matmul, lambda: flops_of(jax.make_jaxpr(layers)(state.params).jaxpr))


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
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += flops_of(inner) if hasattr(inner, "eqns") else 0
    return total


def original(options: dict, tuned: bool = True, compiled: bool = False, autocast: bool = False) -> Contender:
    """The original PyTorch code, trained as its examples/ex_mnist_simple.py does."""
    sys.path.insert(0, options["reference"])
    from src.blocks import UNet
    from src.simple.diffusion import DiffusionModel, DiffusionModelConfig

    network = UNet(1, options["embed_dim"], CHANNELS)
    make = lambda network: DiffusionModel(  # noqa: E731
        nn_module=network,
        input_shape=(1, SIDE, SIDE),
        config=DiffusionModelConfig(num_timesteps=T, target_type="pred_x_0", gamma_type="ddpm"),
    )
    return in_torch(options, network, make, tuned, compiled, autocast)


def diffusers(options: dict) -> Contender:
    """diffusers' UNet2DModel of the nearest size, with a squared error; timed for its rate alone."""
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        block_out_channels=tuple(options["embed_dim"] * scale for scale in CHANNELS),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
    )

    class Model:
        nn_module, parameters = staticmethod(lambda x, t: network(x, t).sample), network.parameters
        loss, train, eval = staticmethod(lambda x: (network(x, 1).sample - x) ** 2), network.train, network.eval

    return in_torch(options, network, lambda _: Model, tuned=True)


def in_torch(
    options: dict, network: Any, make_model: Callable, tuned: bool, compiled: bool = False, autocast: bool = False
) -> Contender:
    """Tuned is in channels_last, with freed memory kept as this project keeps it."""
    import torch
    from machine import keep_freed_memory
    from torch.utils.flop_counter import FlopCounterMode

    if tuned:
        keep_freed_memory()
    torch.manual_seed(0)
    layout = torch.channels_last if tuned else torch.contiguous_format
    network = network.to(memory_format=layout)
    model = make_model(torch.compile(network, dynamic=False) if compiled else network)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = torch.rand(1000, 1, SIDE, SIDE) * 2 - 1
    x = data[: options["batch_size"]].contiguous(memory_format=layout)
    t = torch.ones(options["batch_size"], dtype=torch.int64)
    square = torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16 if autocast else torch.float32)
    cast = partial(torch.autocast, "cpu", torch.bfloat16) if autocast else contextlib.nullcontext

    def train():
        model.train()
        batch = data[torch.randint(len(data), (options["batch_size"],))].contiguous(memory_format=layout)
        optimizer.zero_grad()
        with cast():
            loss = model.loss(batch).mean()
        loss.backward()
        optimizer.step()

    def forward():
        model.eval()
        with torch.no_grad(), cast():
            model.nn_module(x, t)

    def sample(steps: int):
        model.eval()
        with torch.no_grad(), cast():
            model.sample(options["num_samples"], "cpu", steps)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(x, t)
        return counter.get_total_flops()

    return Contender(train, forward, sample if hasattr(model, "sample") else None, lambda: square @ square, flops)


CONTENDERS = {
    "ours": partial(ours, precision="float32"),
    "ours, bfloat16": partial(ours, precision="bfloat16"),
    "original, as it is": partial(original, tuned=False),
    "original, tuned": original,
    "original, tuned, torch.compile": partial(original, compiled=True),
    "original, tuned, torch.compile, bfloat16": partial(original, compiled=True, autocast=True),
    "diffusers UNet2DModel, tuned": diffusers,
}


def seconds(work: Callable, *args: int) -> float:
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    contender = CONTENDERS[name](options)
    print(json.dumps(seconds(contender.train)), flush=True)
    for line in sys.stdin:
        command, *args = line.split()
        if command == "memory":
            answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        elif command == "flops":
            answer = contender.flops()
        else:
            work = getattr(contender, command)
            answer = None if work is None else seconds(work, *map(int, args))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
