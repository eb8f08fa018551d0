"""Save and restore the training state with Orbax. A step counts as saved once its folder has its final name."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from diffusion_jax.training import TrainState


def open_checkpoints(directory: str | Path, keep: int = 2) -> ocp.CheckpointManager:
    """The checkpoints in `directory`, of which the last `keep` are kept. Close it (or use `with`) to finish its last save."""
    return ocp.CheckpointManager(Path(directory).absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep))


def save(checkpoints: ocp.CheckpointManager, state: TrainState) -> None:
    """Save `state` under its step, in the background, unless that step is saved already."""
    step = int(state.step)
    if step != checkpoints.latest_step():
        checkpoints.save(step, args=ocp.args.StandardSave(_arrays(state)))


def restore_latest(checkpoints: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The newest saved state, with the shapes and placement of `state`; `state` itself if none is saved."""
    step = checkpoints.latest_step()
    if step is None:
        return state
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(state))
    return state.replace(**checkpoints.restore(step, args=ocp.args.StandardRestore(abstract)))


def _arrays(state: TrainState) -> dict[str, PyTree]:
    return {name: getattr(state, name) for name in ("step", "params", "ema_params", "opt_state")}
