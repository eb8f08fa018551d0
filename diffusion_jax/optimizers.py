"""Adam [Kingma & Ba 2015] and Muon [Jordan et al. 2024], with a learning rate that decays to zero.

Muon replaces the momentum G = U S V^T of each matrix by about U V^T, so that all its directions learn at the same rate. Five
Newton-Schulz steps X <- X (a I + b X^T X + c (X^T X)^2) map the singular values of X = G / |G|_F above 1 / 650 to 0.68..1.21.
Each step multiplies X by a polynomial in X^T X, so the code iterates the small matrix X^T X and multiplies X only once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS, MOMENTUM = 5, 0.95
RMS = 0.2  # of an update before the learning rate; about Adam's, so both can share a learning rate [Liu et al. 2025]
ADAM_LAYERS = ("stem", "out")


def cosine_decay(learning_rate: float, iterations: int, warmup: int = 0) -> optax.Schedule:
    """Linear warmup from 0 in `warmup` steps (at most half of `iterations`), then cosine decay to 0 at step `iterations`.

    Raises ValueError on a negative `warmup`.
    """
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    warmup = min(warmup, iterations // 2)
    if not warmup:
        return optax.cosine_decay_schedule(learning_rate, iterations)
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, iterations)


def adam_with_cosine_decay(learning_rate: float, iterations: int, warmup: int = 0) -> optax.GradientTransformation:
    """Adam with the learning rate of `cosine_decay`."""
    return optax.adam(cosine_decay(learning_rate, iterations, warmup))


def muon_with_cosine_decay(learning_rate: float, iterations: int, warmup: int = 0) -> optax.GradientTransformation:
    """Muon for parameters named "kernel", Adam for all others and for the layers "stem" and "out"; both at one learning rate.

    "stem" and "out" are the first and last layers of `UNet` and `DiT`, at the top level of the parameters.
    """
    schedule = cosine_decay(learning_rate, iterations, warmup)
    muon = optax.chain(scale_by_muon(), optax.scale_by_learning_rate(schedule))
    return optax.multi_transform({"muon": muon, "adam": optax.adam(schedule)}, _method_of_each)


class MuonState(NamedTuple):
    momentum: PyTree


def scale_by_muon() -> optax.GradientTransformation:
    """Replace the update of each matrix by its orthogonalized Nesterov momentum, scaled to a root mean square of about RMS."""

    def init(params: PyTree) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, MuonState]:
        momentum = optax.tree_utils.tree_update_moment(updates, state.momentum, MOMENTUM, 1)
        nesterov = optax.tree_utils.tree_update_moment(updates, momentum, MOMENTUM, 1)
        return jax.tree.map(_scaled_direction, nesterov), MuonState(momentum)

    return optax.GradientTransformation(init, update)


def orthogonalized(matrix: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Approximate U V^T for `matrix` = U S V^T by Newton-Schulz iteration. A zero matrix gives zero."""
    if matrix.shape[0] < matrix.shape[1]:
        return orthogonalized(matrix.T).T
    with jax.default_matmul_precision("highest"):  # lower precision makes small eigenvalues negative, which then grow
        x = matrix / (jnp.linalg.norm(matrix) + 1e-8)
        gram, product = x.T @ x, jnp.eye(x.shape[1], dtype=x.dtype)
        a, b, c = NEWTON_SCHULZ
        for _ in range(STEPS):
            factor = a * jnp.eye(len(gram), dtype=x.dtype) + b * gram + c * gram @ gram
            gram, product = factor @ gram @ factor, product @ factor
        return x @ product


def _scaled_direction(kernel: Float[Array, "..."]) -> Float[Array, "..."]:
    """Orthogonalize and scale a kernel as a matrix, whose rows are the 9 C inputs of a 3x3 convolution or the first axis."""
    inputs = kernel.size // kernel.shape[-1] if kernel.shape[:2] == (3, 3) else kernel.shape[0]
    matrix = kernel.reshape(inputs, -1)
    return (RMS * max(matrix.shape) ** 0.5 * orthogonalized(matrix)).reshape(kernel.shape)


def _method_of_each(params: PyTree) -> PyTree:
    """ "muon" or "adam" for each parameter."""

    def method(path, x):
        names = [getattr(key, "key", None) for key in path if getattr(key, "key", None) != "params"]
        return "muon" if names and names[-1] == "kernel" and names[0] not in ADAM_LAYERS and x.ndim > 1 else "adam"

    return jax.tree_util.tree_map_with_path(method, params)
