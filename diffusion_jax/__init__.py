"""Denoising diffusion as pure functions: noise schedules, the loss, and every sampler as a table of affine steps."""

from diffusion_jax.diffusion import (
    Denoise,
    convert,
    diffusion_loss,
    loss_at,
    make_denoiser,
    min_snr_weight,
    posterior,
    q_sample,
)
from diffusion_jax.editing import encoding_table, guided, inpainting, part_way, resampled, spherical
from diffusion_jax.likelihood import bound_bits, bound_loss, hybrid_loss, prior_bits
from diffusion_jax.mlp import MLP
from diffusion_jax.sampling import (
    SamplerTable,
    ancestral_table,
    ddim_table,
    dpm_solver_table,
    padded,
    sample,
    sample_trajectory,
)
from diffusion_jax.schedules import NoiseSchedule, cosine_schedule, linear_schedule, schedule_from_beta
from diffusion_jax.training import (
    TrainState,
    adam_with_cosine_decay,
    cosine_decay,
    create_train_state,
    example_keys,
    over_devices,
    train_step,
)
from diffusion_jax.unet import UNet

__version__ = "0.2.0"

__all__ = [
    "MLP",
    "Denoise",
    "NoiseSchedule",
    "SamplerTable",
    "TrainState",
    "UNet",
    "adam_with_cosine_decay",
    "ancestral_table",
    "bound_bits",
    "bound_loss",
    "convert",
    "cosine_decay",
    "cosine_schedule",
    "create_train_state",
    "ddim_table",
    "diffusion_loss",
    "dpm_solver_table",
    "encoding_table",
    "example_keys",
    "guided",
    "hybrid_loss",
    "inpainting",
    "linear_schedule",
    "loss_at",
    "make_denoiser",
    "min_snr_weight",
    "over_devices",
    "padded",
    "part_way",
    "posterior",
    "prior_bits",
    "q_sample",
    "resampled",
    "sample",
    "sample_trajectory",
    "schedule_from_beta",
    "spherical",
    "train_step",
]
