"""Lowers the main programs for GPU and TPU on this machine and checks that they contain nothing CPU-specific."""

import dataclasses
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import diffusion_jax as dj
from support import model, objective
from support.batches import training_step
from support.classifier import Classifier
from support.config import PRESETS

CONFIG = dataclasses.replace(PRESETS["paper"], embed_dim=8, dim_scales=(1,), batch_size=8, num_timesteps=10)
BLOCKS = 2 + 2 + 2 + 1  # two each way, in the middle, and the last
NORMALIZATIONS = 2 * BLOCKS + 2
CONVOLUTIONS = 2 * BLOCKS
SCHEDULE = dj.cosine_schedule(CONFIG.num_timesteps)
PROGRAMS_OF_SHARDING = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
ON_EACH = pytest.mark.parametrize("platform", ["cuda", "tpu"])
IN_EACH = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


@cache
def initial_state(network: str = "unet") -> dj.TrainState:
    return model.initial_state(dataclasses.replace(CONFIG, network=network, depth=2), jax.random.key(0))


def lowered(fn, platform, *operands, allowed: tuple[str, ...] = ()) -> str:
    """Exporting refuses each custom call that is not among those `allowed`, or promised by JAX to stay."""
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in allowed]
    return export.export(jax.jit(fn), platforms=[platform], disabled_checks=checks)(*operands).mlir_module()


def count(operation: str, program: str) -> int:
    return len(re.findall(rf"stablehlo\.{operation}\b", program))


def assert_made_for_accelerators(program: str, custom_calls: tuple[str, ...] = (), recomputed: int = 0) -> None:
    """No callbacks and casts of bits, no `custom_calls` but these, and no barriers but those of `recomputed` normalizations."""
    assert set(re.findall(r"custom_call @(\w+)", program)) <= {*custom_calls, *PROGRAMS_OF_SHARDING}
    assert count("optimization_barrier", program) <= recomputed
    assert not re.search(r"bitcast_convert \S+ : \(tensor<[\dx]*x(f32|bf16)>\)", program)  # as random numbers, the other way


def step_and_operands(config):
    """The training step of a state's leaves, since JAX's export puts things into a state that the tests' type checks refuse."""
    step = training_step(objective.make_loss(config, SCHEDULE), jax.random.key(0), 8, 0.0)
    leaves, structure = jax.tree.flatten(initial_state(config.network))

    def step_of_leaves(leaves, *batch, mean_over_devices):
        state, (images, labels, *which) = jax.tree.unflatten(structure, leaves), batch
        return jax.tree.leaves(step(state, (images, labels), *which, mean_over_devices=mean_over_devices))

    images, labels = jax.ShapeDtypeStruct((100, 28, 28, 1), jnp.uint8), jax.ShapeDtypeStruct((100,), jnp.int32)
    indices = jax.ShapeDtypeStruct((8,), jnp.int32)
    return step_of_leaves, (leaves, images, labels, indices, indices)


def on_one(step):
    return partial(step, mean_over_devices=lambda tree: tree)


def on_eight(step):
    mesh, batch = AbstractMesh((8,), ("devices",), axis_types=(AxisType.Auto,)), P("devices")
    step = partial(step, mean_over_devices=lambda tree: jax.lax.pmean(tree, "devices"))
    return jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P(), batch, batch), out_specs=P(), check_vma=False)


@ON_EACH
@IN_EACH
@pytest.mark.parametrize("spread", [on_one, pytest.param(on_eight, marks=pytest.mark.slow)])
def test_training_step(platform, precision, spread):
    step, operands = step_and_operands(dataclasses.replace(CONFIG, precision=precision))
    layouts = ("LayoutConstraint",) if platform == "cuda" else ()  # of the kernels' gradients
    program = lowered(spread(step), platform, *operands, allowed=layouts)
    assert_made_for_accelerators(program, layouts, recomputed=NORMALIZATIONS)
    assert count("convolution", program) == 3 * CONVOLUTIONS  # forward, and for each gradient
    kinds = re.findall(r"stablehlo.convolution.*-> tensor<[\dx]*x(\w+)>", program)
    assert set(kinds) == {{"float32": "f32", "bfloat16": "bf16"}[precision]}


@ON_EACH
@IN_EACH
def test_training_step_of_a_transformer(platform, precision):
    step, operands = step_and_operands(dataclasses.replace(CONFIG, precision=precision, network="dit", depth=2))
    program = lowered(on_one(step), platform, *operands)
    assert_made_for_accelerators(program)
    assert count("convolution", program) == 0


def test_a_program_for_a_cpu_is_not_taken_for_one_of_an_accelerator():
    step, operands = step_and_operands(CONFIG)
    program = lowered(on_one(step), "cpu", *operands, allowed=("LayoutConstraint",))
    with pytest.raises(AssertionError):
        assert_made_for_accelerators(program, ("LayoutConstraint",), recomputed=NORMALIZATIONS)


@ON_EACH
@IN_EACH
@pytest.mark.parametrize("sample", [dj.sample, dj.sample_trajectory])
def test_sampling(platform, precision, sample):
    config = dataclasses.replace(CONFIG, precision=precision)
    table = dj.ancestral_table(SCHEDULE)

    def draw(params, examples):
        denoise = model.make_denoiser(config, SCHEDULE, params)
        return sample(denoise, table, dj.example_keys(jax.random.key(0), examples), model.image_shape(config))

    program = lowered(draw, platform, initial_state().params, jax.ShapeDtypeStruct((8,), jnp.int32))
    assert_made_for_accelerators(program)
    assert count("convolution", program) == CONVOLUTIONS
    assert count("while", program) >= 1


@ON_EACH
def test_evaluation(platform):
    images = jax.ShapeDtypeStruct((8, 28, 28, 1), jnp.uint8)
    params = jax.eval_shape(Classifier().init, jax.random.key(0), images)
    assert_made_for_accelerators(lowered(Classifier().apply, platform, params, images))

    def bits(params, x_0, t, eps):
        return dj.bound_bits(SCHEDULE, model.make_denoiser(CONFIG, SCHEDULE, params), x_0, t, eps)

    x_0, t = jax.ShapeDtypeStruct((8, 32, 32, 1), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    assert_made_for_accelerators(lowered(bits, platform, initial_state().params, x_0, t, x_0))
