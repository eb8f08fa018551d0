"""Options of a run of mnist.py, presets, and their validation."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Literal, TypeVar

import jax
import tyro

from diffusion_jax.diffusion import TargetType
from diffusion_jax.losses import TimeDensity
from diffusion_jax.sampling import SigmaType
from diffusion_jax.training import check_divisible
from support.command_line import check_values, parse_command_line, require
from support.data import ImageData
from support.machine import warn_of_emulated

Value = TypeVar("Value")
Found = tyro.conf.Suppress[tyro.conf.Fixed[Value]]  # set by the program, not an option


@dataclasses.dataclass(frozen=True)
class Run:
    preset: Literal["auto", "paper", "improved", "small"] = "paper"
    """small: for a CPU. paper: published recipe. improved: paper's network, small's method. auto: small on CPUs, else paper."""
    workdir: str = "runs/mnist"
    """Folder of the run. Repeat the command to continue it."""
    seed: int = 0
    """Random seed."""
    distributed: bool = False
    """Join other processes that train the same run."""


@dataclasses.dataclass(frozen=True)
class Data:
    dataset: str = "auto"
    """mnist, fashion_mnist, digits, auto (MNIST or, offline, digits), a folder of images, a .npy or .npz, or a TFDS name."""
    data_dir: str | None = None
    """TFDS data directory; by default TFDS's own."""
    image_size: int = 32
    """Height and width of the network's images, even. 0: as the data are, or 32 for a folder and for images of 28x28."""
    channels: Literal[0, 1, 3] = 1
    """1: grey, 3: colour. 0: as the data are, or colour for a folder."""
    conditional: bool = False
    """Train a class-conditional network; with the presets small and improved by default, if the images have classes."""
    label_dropout: float = 0.1
    """Probability of dropping a label in conditional training, for guidance."""
    num_classes: Found[int] = 10
    """Classes of the data; 0 for images without labels."""
    images: Found[int | None] = None
    """A checksum of images that are kept in a folder or a file."""


@dataclasses.dataclass(frozen=True)
class Network:
    network: Literal["unet", "dit"] = "unet"
    """unet, or dit: a transformer of image patches (Peebles & Xie 2023)."""
    embed_dim: int = 128
    """Channels of the first and last layers of a unet, or of all layers of a dit."""
    dim_scales: tuple[int, ...] = (1, 2, 4, 8)
    """unet: channels after each level, as multiples of embed_dim. Each level but the last halves the resolution."""
    depth: int = 6
    """dit: number of blocks."""
    patch_size: Literal[1, 2, 4, 8] = 1
    """Height and width of the input patches in pixels; 4 is usual for a dit."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's layers; parameters are float32."""


@dataclasses.dataclass(frozen=True)
class Diffusion:
    num_timesteps: int = 500
    """Number T of steps of the forward process."""
    noise_schedule_type: Literal["linear", "cosine", "flow", "ve"] = "cosine"
    """linear (Ho et al. 2020), cosine (Nichol & Dhariwal 2021), flow: rectified flow, ve: variance-exploding."""
    target_type: TargetType = "pred_x_0"
    """Prediction target. pred_u is flow's velocity, edm the network output of Karras et al. (2022)."""
    time_input: Literal["t", "log_snr"] = "t"
    """Time input of the network. With log_snr it can also sample on other paths (from Python)."""
    time_density: TimeDensity = "uniform"
    """Distribution of t with l2, l1 and mean_flow losses; other losses have their own."""
    stratified: bool = False
    """Stratify t over each batch, with l2, l1 and mean_flow losses."""
    sigma_type: SigmaType = "upper_bound"
    """Variance of ancestral sampling. learned needs a hybrid or bound loss and a target other than pred_x_0."""
    loss_type: Literal["l2", "l1", "hybrid", "bound", "distilled", "mean_flow"] = "l2"
    """l2, l1; hybrid or bound for learned variances; for one to four calls, distilled (from --init) or mean_flow."""
    training_guidance: float = 1.0
    """Guidance scale that distilled and mean_flow losses teach, for conditional runs."""
    loss_weighting: Literal["none", "min_snr"] = "none"
    """Weights of the timesteps: none, or min_snr (Hang et al. 2023), for l2, l1 and hybrid losses."""


@dataclasses.dataclass(frozen=True)
class Training:
    iterations: int = 2000
    """Number of training steps."""
    batch_size: int = 512
    """Images in a training step, over all devices."""
    optimizer: Literal["adam", "muon"] = "adam"
    """adam, or muon for the kernels and adam for other parameters (Jordan et al. 2024)."""
    learning_rate: float = 1e-3
    """Learning rate at the start of its cosine decay."""
    warmup: int = 0
    """Warm-up steps of the learning rate, at most half of all steps."""
    init: str | None = None
    """Network to start from, a run's folder or a file of export.py; by default random parameters."""
    teacher: Found[int | None] = None
    """A checksum of the network that a distilled run learns from."""
    ema_decay: float = 0.0
    """Decay of the parameters' moving average, which is used for sampling; 0 uses the last parameters."""


@dataclasses.dataclass(frozen=True)
class Output:
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    sample_every: int = 500
    """Steps between sample grids during training; 0 for none."""
    sampling_timesteps: int | None = None
    """Sampling steps of the final figure; by default T, or 4 with distilled and mean_flow losses."""
    num_samples: int = 20
    """Samples in each grid and in the figure."""


@dataclasses.dataclass(frozen=True)
class Config(Output, Training, Diffusion, Network, Data, Run):
    """All options of a run. The base classes are the groups of --help."""

    @property
    def few_calls(self) -> bool:
        """Whether the network takes two times and samples with few calls."""
        return self.loss_type in ("distilled", "mean_flow")

    @property
    def distilled(self) -> bool:
        return self.loss_type == "distilled"


MAY_DIFFER = {"workdir", "data_dir", "checkpoint_every", "sample_every", "sampling_timesteps", "num_samples", "distributed"}
IMPROVED = {
    "conditional": True,
    "target_type": "pred_v",
    "optimizer": "muon",
    "learning_rate": 4e-3,
    "warmup": 100,
    "time_density": "logit_normal",
    "stratified": True,
}
PRESETS = {
    "paper": Config(checkpoint_every=500),  # 2 GB each
    "improved": Config(preset="improved", **IMPROVED),
    "small": Config(
        preset="small",
        iterations=1000,
        batch_size=64,
        embed_dim=32,
        dim_scales=(1, 2, 4),
        patch_size=2,
        checkpoint_every=200,
        **IMPROVED,
    ),
}


def parse_run(description: str | None) -> Config:
    """The config given on the command line. Raises ValueError on an invalid one."""
    preset = choose_preset(sys.argv[1:])
    default = dataclasses.replace(PRESETS[preset], image_size=0, channels=0)  # as in the data
    config = dataclasses.replace(parse_command_line(default, description), preset=preset)
    check(config)
    check_divisible(config.batch_size, jax.device_count())
    warn_of_emulated(config.precision)
    return config


def described_by(config: Config, data: ImageData, args: Sequence[str]) -> Config:
    """The config with what the data say about the run. Without classes, the `conditional` of a preset becomes False.

    Raises ValueError if there are no classes and the command line asks for some, or for guidance towards them.
    """
    conditional = config.conditional and data.num_classes > 0
    wanted = "left out for images without classes; a folder has classes if all of its images are in two or more subfolders"
    require(data.num_classes > 0 or "--conditional" not in args, "conditional", True, wanted)
    guided = config.training_guidance != 1 and not conditional
    require(not guided, "training_guidance", config.training_guidance, "1 for images without classes")
    return dataclasses.replace(
        config,
        conditional=conditional,
        dataset=data.name,
        image_size=data.image_size,
        channels=data.images.shape[3],
        num_classes=data.num_classes,
        images=data.checksum,
    )


def choose_preset(args: list[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", default="auto")
    preset = parser.parse_known_args(args)[0].preset
    return preset if preset in PRESETS else "small" if jax.default_backend() == "cpu" else "paper"


def check_calls(calls: int, num_timesteps: int) -> None:
    require(1 <= calls <= num_timesteps, "sampling_timesteps", calls, f"between 1 and num_timesteps = {num_timesteps}")


def check(config: Config) -> None:
    """Raise ValueError on the first invalid value or combination."""
    check_values(config)
    if config.sampling_timesteps is not None:
        check_calls(config.sampling_timesteps, config.num_timesteps)
    losses = ("hybrid", "bound") if config.sigma_type == "learned" else ("l2", "l1", "distilled", "mean_flow")
    scaled = config.sigma_type != "learned" or config.target_type != "pred_x_0"
    require(scaled, "target_type", config.target_type, "other than pred_x_0 with --sigma-type learned")
    weighted = config.loss_weighting != "none" and config.loss_type == "bound"
    require(not weighted, "loss_weighting", config.loss_weighting, "none with --loss-type bound")
    defined = config.noise_schedule_type != "flow" or config.target_type != "pred_eps"
    require(defined, "target_type", config.target_type, "other than pred_eps with flow, which has no signal at t = T")
    bounded = config.noise_schedule_type != "ve" or config.target_type != "pred_v"
    require(bounded, "target_type", config.target_type, "other than pred_v with ve, for example edm")
    require(config.loss_type in losses, "loss_type", config.loss_type, f"{' or '.join(losses)} with this --sigma-type")
    if config.few_calls:
        same = {"loss_weighting": "none", "time_input": "t"}
        same |= {"noise_schedule_type": "flow", "target_type": "pred_u"} if config.loss_type == "mean_flow" else {}
        for name, value in same.items():
            require(getattr(config, name) == value, name, getattr(config, name), f"{value} with --loss-type {config.loss_type}")
    if config.distilled:
        require(bool(config.init), "init", config.init, "the run to learn from, with --loss-type distilled")
        require(config.target_type != "pred_eps", "target_type", "pred_eps", "another one with --loss-type distilled")
    guided, allowed = config.training_guidance != 1, config.conditional and config.few_calls
    wanted = "1 except with --conditional and a --loss-type for few calls"
    require(allowed or not guided, "training_guidance", config.training_guidance, wanted)
