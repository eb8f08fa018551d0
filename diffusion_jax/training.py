"""The training state, one training step, and the code that depends on the devices."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Float, Int, Key, PyTree

AXIS_NAME = "devices"


class TrainState(train_state.TrainState):
    """step, params and opt_state, with an exponential moving average of the parameters. Nothing else is needed to resume."""

    params: PyTree = struct.field(pytree_node=True)
    opt_state: PyTree = struct.field(pytree_node=True)
    ema_params: PyTree = struct.field(pytree_node=True)


def create_train_state(apply_fn: Callable, params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. ema_params is a copy of params, so that both can be donated."""
    # result_type removes weak types, and float64 where x64 is off, so that the first step does not retrace.
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)
    ema_params = jax.tree.map(jnp.copy, params)
    state = TrainState.create(apply_fn=apply_fn, params=params, tx=optimizer, ema_params=ema_params)
    return state.replace(step=jnp.zeros((), jnp.int32))


def example_keys(key: Key[Array, ""], examples: Int[Array, " B"]) -> Key[Array, " B"]:
    """A key for each example, which depends only on its number, not on its batch or device."""
    return jax.vmap(lambda example: jax.random.fold_in(key, example))(examples)


def train_step(
    state: TrainState,
    batch: PyTree[Array],
    keys: Key[Array, " B"],
    *,
    loss_fn: Callable[[PyTree, Array, Array], Array],
    ema_decay: float,
    mean_over_devices: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One optimizer step on the mean of `loss_fn(params, batch, keys)`; returns the new state and its metrics.

    The moving average has the decay min(ema_decay, (1 + step) / (10 + step)), so that short runs forget their initial values.
    Every array keeps its dtype.
    """
    loss, grads = jax.value_and_grad(lambda params: loss_fn(params, batch, keys).mean())(state.params)
    loss, grads = mean_over_devices((loss, grads))
    state = state.apply_gradients(grads=grads)
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))

    def average(ema, new):
        return (decay * ema + (1 - decay) * new).astype(ema.dtype)

    ema_params = jax.tree.map(average, state.ema_params, state.params)
    return state.replace(ema_params=ema_params), {"loss": loss, "grad_norm": optax.tree.norm(grads)}


def over_devices(
    fn: Callable,
    in_axes: tuple[int | None, ...],
    out_axes: int | None,
    devices: Sequence[Any],
    donate_argnums: tuple[int, ...] = (),
) -> Callable:
    """Compile `fn`, with jit on one device or with pmap on several.

    On each device, `fn` gets a slice of each argument whose `in_axes` is 0 and all of each argument whose `in_axes` is None.
    Results are joined along `out_axes`. If `out_axes` is None, they must be equal on all devices, and `fn` also gets the
    keyword argument `mean_over_devices` to make them so. The compiled function takes and returns whole arrays. Raises
    ValueError if `devices` is empty, and when called with an argument whose length the number of devices does not divide.

    `devices` may belong to several processes if `out_axes` is None. Each process then calls the compiled function with the same
    arguments, gets the same results, and copies to its own devices only their slices.
    """
    if not devices:
        raise ValueError("there must be at least one device, got none")
    if len(devices) == 1:
        fn = partial(fn, mean_over_devices=lambda tree: tree) if out_axes is None else fn
        return jax.jit(fn, donate_argnums=donate_argnums, in_shardings=SingleDeviceSharding(devices[0]))
    devices = sorted(devices, key=lambda device: device.process_index)
    owners = [device.process_index for device in devices]
    mine = slice(owners.index(jax.process_index()), owners.index(jax.process_index()) + owners.count(jax.process_index()))
    pmean = partial(jax.lax.pmean, axis_name=AXIS_NAME)
    mapped = jax.pmap(
        partial(fn, mean_over_devices=pmean) if out_axes is None else fn,
        axis_name=AXIS_NAME,
        in_axes=in_axes,
        out_axes=out_axes,
        devices=devices,
        axis_size=len(devices),  # without it pmap requires the same number of devices in each process
        donate_argnums=donate_argnums,
    )

    def place(arg, axis):
        if axis is None:  # placed like the results, so that the next call does not recompile
            return replicate(arg, devices)
        check_divisible(len(arg), len(devices))
        return arg.reshape(len(devices), -1, *arg.shape[1:])[mine]

    def join(x, axis):
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def compiled(*args):
        result = mapped(*map(place, args, in_axes))
        return result if out_axes is None else jax.tree.map(partial(join, axis=out_axes), result)

    return compiled


def replicate(tree: PyTree, devices: Sequence[Any]) -> PyTree:
    """Copy `tree` to each of this process's `devices`, once, for arguments that a compiled function reads often."""
    if len(devices) == 1:
        return jax.device_put(tree, devices[0])
    mesh = Mesh([device for device in devices if device.process_index == jax.process_index()], AXIS_NAME)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def check_divisible(batch_size: int, num_devices: int) -> None:
    """Raise ValueError unless `num_devices` divides `batch_size`."""
    if batch_size % num_devices:
        raise ValueError(f"the batch size must be a multiple of the number of devices, {num_devices}, got {batch_size}")
