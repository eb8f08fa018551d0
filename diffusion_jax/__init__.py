"""Denoising diffusion as pure functions: noise schedules, the loss, and every sampler as a table of affine steps."""

from diffusion_jax.diffusion import (
    convert,
    make_denoiser,
    normalized,
    posterior,
    q_sample,
)
from diffusion_jax.dit import DiT
from diffusion_jax.editing import encoding_table, guided, inpainting, part_way, resampled, spherical
from diffusion_jax.flow_map import consistency_table, guided_velocity, jump_target, jumping, mean_flow_loss
from diffusion_jax.likelihood import bound_bits, bound_loss, flow_bits, flow_log_density, hybrid_loss, prior_bits
from diffusion_jax.losses import diffusion_loss, loss_at, min_snr_weight
from diffusion_jax.mlp import MLP
from diffusion_jax.optimizers import adam_with_cosine_decay, cosine_decay, muon_with_cosine_decay
from diffusion_jax.sampling import (
    SamplerTable,
    ancestral_table,
    ddim_table,
    padded,
    sample,
    sample_trajectory,
    sampling_times,
)
from diffusion_jax.schedules import (
    NoiseSchedule,
    cosine_schedule,
    flow_schedule,
    linear_schedule,
    schedule_from_beta,
    schedule_from_columns,
    variance_exploding_schedule,
)
from diffusion_jax.solvers import deis_table, dpm_solver_table, heun_table, unipc_table
from diffusion_jax.training import (
    TrainState,
    create_train_state,
    example_keys,
    over_devices,
    train_step,
)
from diffusion_jax.unet import UNet

__version__ = "0.3.0"

__all__ = [
    "MLP",
    "DiT",
    "NoiseSchedule",
    "SamplerTable",
    "TrainState",
    "UNet",
    "adam_with_cosine_decay",
    "ancestral_table",
    "bound_bits",
    "bound_loss",
    "consistency_table",
    "convert",
    "cosine_decay",
    "cosine_schedule",
    "create_train_state",
    "ddim_table",
    "deis_table",
    "diffusion_loss",
    "dpm_solver_table",
    "encoding_table",
    "example_keys",
    "flow_bits",
    "flow_log_density",
    "flow_schedule",
    "guided",
    "guided_velocity",
    "heun_table",
    "hybrid_loss",
    "inpainting",
    "jump_target",
    "jumping",
    "linear_schedule",
    "loss_at",
    "make_denoiser",
    "mean_flow_loss",
    "min_snr_weight",
    "muon_with_cosine_decay",
    "normalized",
    "over_devices",
    "padded",
    "part_way",
    "posterior",
    "prior_bits",
    "q_sample",
    "resampled",
    "sample",
    "sample_trajectory",
    "sampling_times",
    "schedule_from_beta",
    "schedule_from_columns",
    "spherical",
    "train_step",
    "unipc_table",
    "variance_exploding_schedule",
]
