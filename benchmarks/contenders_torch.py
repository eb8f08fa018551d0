"""The contenders of contenders.py that run in PyTorch, on its GPU where it has one."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contenders import CHANNELS, MATMUL, SIDE, Contender, T, memory_of_process, timed
from torch.utils.flop_counter import FlopCounterMode

from support.machine import keep_freed_memory


def original(options: dict, tuned: bool = True, mode: str | None = None, autocast: bool = False) -> Contender:
    """The original PyTorch code, trained as its examples/ex_mnist_simple.py does."""
    sys.path.insert(0, options["reference"])
    from src.blocks import UNet
    from src.simple.diffusion import DiffusionModel, DiffusionModelConfig

    network = UNet(1, options["embed_dim"], options.get("dim_scales", CHANNELS))
    config = DiffusionModelConfig(num_timesteps=T, target_type="pred_x_0", gamma_type="ddpm")
    return in_torch(options, network, partial(DiffusionModel, (1, SIDE, SIDE), config=config), tuned, mode, autocast)


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

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.nn_module = lambda x, t: network(x, t).sample
            self.network = network

        def loss(self, x):
            return (self.nn_module(x, 1) - x) ** 2

    return in_torch(options, network, lambda _: Model(), tuned=True)


def in_torch(
    options: dict, network: Any, make_model: Callable, tuned: bool, mode: str | None = None, autocast: bool = False
) -> Contender:
    """`tuned` is in channels_last, with TF32 and cuDNN's search on a GPU, and with freed memory kept on a CPU.

    `mode` is that of torch.compile.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if tuned:
        keep_freed_memory()
        torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(0)
    layout = torch.channels_last if tuned else torch.contiguous_format
    network = network.to(memory_format=layout)
    model = make_model(torch.compile(network, mode=mode, dynamic=False) if mode else network).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = torch.rand(60_000, 1, SIDE, SIDE, device=device) * 2 - 1
    x = data[: options["batch_size"]].contiguous(memory_format=layout)
    t = torch.ones(options["batch_size"], dtype=torch.int64, device=device)
    square = torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16 if autocast else torch.float32, device=device)
    cast = partial(torch.autocast, device, torch.bfloat16) if autocast else contextlib.nullcontext
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def train(steps: int = 1) -> None:
        model.train()
        for _ in range(steps):
            batch = data[torch.randint(len(data), (options["batch_size"],), device=device)].contiguous(memory_format=layout)
            optimizer.zero_grad()
            with cast():
                loss = model.loss(batch).mean()
            loss.backward()
            optimizer.step()
        wait()

    def forward() -> None:
        model.eval()
        with torch.no_grad(), cast():
            model.nn_module(x, t)
        wait()

    def sample(count: int, steps: int) -> None:
        model.eval()
        with torch.no_grad(), cast():
            model.sample(count, device, steps)
        wait()

    def flops() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(x, t)
        return counter.get_total_flops()

    return {
        "train": timed(train),
        "forward": timed(forward),
        "sample": timed(sample) if hasattr(model, "sample") else lambda *_: None,
        "matmul": timed(lambda: (square @ square, wait())),
        "flops": flops,
        "memory": lambda: torch.cuda.max_memory_allocated() if device == "cuda" else memory_of_process(),
    }
