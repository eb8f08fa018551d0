"""One run in several processes, on JAX's own distributed runtime. The first process alone reads and writes the run's folder."""

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

HEARTBEAT_SECONDS = 30
BARRIER_SECONDS = 3600
_BLOCKS = itertools.count()
Result = TypeVar("Result")


def join_processes(args: Sequence[str]) -> None:
    """With --distributed, connect to the run's other processes, before JAX is initialized. Raises ValueError if that fails.

    SLURM, TPU pods, GKE and Open MPI say where they are; by hand, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID do. If one of the processes dies, JAX stops the others within HEARTBEAT_SECONDS or so.
    """
    if "--distributed" not in args:
        return
    try:
        count, number = (
            int(os.environ[name]) if name in os.environ else None for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        address = os.environ.get("JAX_COORDINATOR_ADDRESS")
        if address is not None and not re.fullmatch(r".+:[1-9]\d{0,4}", address):
            raise ValueError(f"JAX_COORDINATOR_ADDRESS must be HOST:PORT, got {address!r}")
        jax.config.update("jax_enable_preemption_service", False)  # otherwise it takes SIGTERM, and our handler never runs
        jax.distributed.initialize(
            num_processes=count,
            process_id=number,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as problem:
        raise ValueError(
            "--distributed must be started by SLURM, on a TPU pod, by GKE or by Open MPI, or with JAX_COORDINATOR_ADDRESS, "
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment ({str(problem).splitlines()[0]})"
        ) from problem


def is_first_process() -> bool:
    return jax.process_index() == 0


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A block that all processes leave together. If one fails in it, all do, and the others say so in one line."""
    problem = None
    try:
        yield
    except (Exception, SystemExit) as error:
        problem = error
    try:
        ocp.multihost.get_barrier_sync_fn()(key=f"block {next(_BLOCKS)}", timeout_ms=BARRIER_SECONDS * 1000)
        failed = largest_of_all(int(problem is not None))
    except Exception as others_are_gone:
        raise problem or others_are_gone from None
    if problem is not None:
        raise problem
    if failed:
        raise SystemExit("error: another process of this run failed; see its error")


def in_turn(fn: Callable[[], Result]) -> Result:
    """The result of `fn` in this process. The first process calls it before the others, since it may prepare something."""
    result: list[Result] = []
    for first in (True, False):
        with failing_together():
            if is_first_process() == first:
                result.append(fn())
    return result[0]


def from_first_process(tree: PyTree) -> PyTree:
    """The first process's arrays, bit for bit, placed as this process's own are."""
    if jax.process_count() == 1:
        return tree
    own = jax.tree.map(lambda x: np.frombuffer(np.asarray(x).tobytes(), np.uint8), tree)
    sent = _maxima(own if is_first_process() else jax.tree.map(np.zeros_like, own))
    return jax.tree.map(lambda x, mine: jax.device_put(x.view(mine.dtype).reshape(mine.shape), mine.sharding), sent, tree)


def largest_of_all(number: int) -> int:
    """The largest of the processes' numbers."""
    return number if jax.process_count() == 1 else int(_maxima(np.int32(number)))


def _maxima(tree: PyTree) -> PyTree:
    """Element by element the largest of the processes' arrays. (`multihost_utils` needs as many devices in each process.)"""
    mesh = Mesh(jax.devices(), "devices")
    by_device, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("devices",), ()))
    shared = jax.tree.map(lambda x: jax.make_array_from_callback((mesh.size, *x.shape), by_device, lambda _: x[None]), tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), jax.jit(_largest_rows, out_shardings=whole)(shared))


def _largest_rows(tree: PyTree) -> PyTree:  # by name, so that jit compiles it once
    return jax.tree.map(lambda x: x.max(0), tree)


def check_same_everywhere(what: str, number: int) -> None:
    """Raise ValueError unless every process comes with the same `number`."""
    largest, smallest = largest_of_all(number), -largest_of_all(-number)
    if largest != smallest:
        raise ValueError(f"all processes of a run must have the same {what}")
