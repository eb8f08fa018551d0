"""Train the original PyTorch code on MNIST and keep samples, for experiments/judge.py.

python benchmarks/original_samples.py --reference ../diffusion
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

from support.data import load_dataset
from support.machine import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", required=True, help="a clone of the original")
    parser.add_argument("--data-dir")
    parser.add_argument("--embed-dim", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--sampling-timesteps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="original_{gamma_type}.npy", help="for each of ddpm and ddim")
    args = parser.parse_args()

    keep_freed_memory()
    torch.manual_seed(args.seed)
    model = train(args, load_dataset("mnist", args.data_dir).images)
    for gamma_type in ("ddpm", "ddim"):
        model.gamma_type = gamma_type
        file = args.out.format(gamma_type=gamma_type)
        np.save(file, draw(model, args.num_samples, args.sampling_timesteps))
        print(f"wrote {file}")


def train(args: argparse.Namespace, images: np.ndarray):
    """As its examples/ex_mnist_simple.py does, at the size asked for."""
    sys.path.insert(0, args.reference)
    from src.blocks import UNet
    from src.simple.diffusion import DiffusionModel, DiffusionModelConfig

    network = UNet(1, args.embed_dim, (1, 2, 4, 8)).to(memory_format=torch.channels_last)
    config = DiffusionModelConfig(num_timesteps=500, target_type="pred_x_0", noise_schedule_type="cosine")
    model = DiffusionModel(nn_module=network, input_shape=(1, 32, 32), config=config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))).transpose(0, 3, 1, 2)
    losses = []
    for _ in tqdm(range(args.iterations), "training"):
        chosen = torch.randint(len(images), (args.batch_size,)).numpy()
        x = torch.from_numpy(padded[chosen].astype(np.float32) / 127.5 - 1)
        optimizer.zero_grad()
        loss = model.loss(x.contiguous(memory_format=torch.channels_last)).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    print(f"mean loss of the last 100 steps: {np.mean(losses[-100:]):.4f}")
    return model.eval()


def draw(model, count: int, steps: int) -> np.ndarray:
    batches = [model.sample(min(100, count - first), "cpu", steps)[0] for first in tqdm(range(0, count, 100), "samples")]
    return torch.cat(batches).numpy().transpose(0, 2, 3, 1)


if __name__ == "__main__":
    main()
