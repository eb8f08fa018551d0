"""A small classifier, whose features say how alike two sets of images are; trained once on a data set's training split."""

import os
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree, UInt8
from tqdm import tqdm

from diffusion_jax.layers import Conv3x3, Dense
from support.batches import batch_indices
from support.data import ImageData
from support.machine import random_key

EPOCHS, BATCH, FEATURES = 4, 100, 64
RECIPE = 0x46966534  # change it with the network or its training, to invalidate cached classifiers


class Outputs(NamedTuple):
    features: Float[Array, "B 64"]
    logits: Float[Array, "B classes"]
    statistics: Float[Array, "B 256"]
    """Mean and deviation over the pixels, for each channel of the third convolution."""


class Classifier(nn.Module):
    """Three convolutions and two dense layers, of images [B, H, W, C] of bytes."""

    classes: int = 10

    @nn.compact
    def __call__(self, images: UInt8[Array, "B H W C"]) -> Outputs:
        x = images.astype(jnp.float32) / 127.5 - 1
        statistics = x
        for number, width in enumerate((32, 64, 128)):
            x = nn.relu(nn.LayerNorm()(Conv3x3(width, jnp.float32, name=f"conv_{number}")(x)))
            statistics = jnp.concatenate([x.mean((1, 2)), x.std((1, 2))], -1)
            x = nn.max_pool(x, (2, 2), (2, 2))
        features = Dense(FEATURES, jnp.float32, name="features")(x.reshape(len(x), -1))
        return Outputs(features, Dense(self.classes, jnp.float32, name="logits")(nn.relu(features)), statistics)


def apply(params: PyTree, images: UInt8[Array, "B H W C"]) -> Outputs:
    outputs: Any = Classifier(params["logits"]["kernel"].shape[1]).apply({"params": params}, images)
    return outputs


Classify = Callable[[np.ndarray], Outputs]


def trained_classifier(data: ImageData, test: ImageData) -> tuple[Classify, float]:
    """classify(images) -> Outputs, and its accuracy on the test split; kept in ~/.cache/diffusion_jax, for these images and
    this RECIPE."""
    made_of = zlib.crc32(np.asarray(data.images).tobytes(), RECIPE ^ (data.checksum or 0))
    file = Path(os.path.expanduser(f"~/.cache/diffusion_jax/classifier_{Path(data.name).name}_{made_of:08x}.npz"))
    params = _load(file)
    if params is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        params = _train(data)
        with file.with_suffix(f".{os.getpid()}").open("wb") as out:
            np.savez(out, **flatten_dict(params, sep="/"))  # pyright: ignore[reportArgumentType]
        os.replace(out.name, file)

    classify = classifier_of(params)
    return classify, float((classify(test.images).logits.argmax(-1) == test.labels).mean())


def untrained_classifier(shape: tuple[int, ...]) -> Classify:
    """The same network with its initial parameters, which depend on the shape of an image alone: a random projection."""
    return classifier_of(_initial_params(shape))


def classifier_of(params: PyTree) -> Classify:
    forward = jax.jit(apply)

    def classify(images: np.ndarray) -> Outputs:
        parts = [forward(params, images[i : i + 500]) for i in range(0, len(images), 500)]
        return Outputs(*(np.concatenate(part) for part in zip(*parts, strict=True)))  # pyright: ignore[reportArgumentType]

    return classify


def _initial_params(shape: tuple[int, ...], classes: int = 10) -> PyTree:
    return jax.jit(Classifier(classes).init)(random_key(0), jnp.zeros((1, *shape), jnp.uint8))["params"]


def _load(file: Path) -> dict | None:
    try:
        with np.load(file, allow_pickle=False) as saved:
            return unflatten_dict(dict(saved), sep="/")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # not there, or not whole
        return None


def _train(data: ImageData) -> dict:
    """Train with Adam, each image shifted by up to two pixels."""
    steps = EPOCHS * max(len(data.images), 15_000) // BATCH
    optimizer = optax.adam(optax.cosine_onecycle_schedule(steps, 3e-3))
    params = _initial_params(data.images.shape[1:], data.num_classes)

    def loss_fn(params, images, labels):
        logits = apply(params, images).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, opt_state, images, labels, key):
        shifts = jax.random.randint(key, (len(images), 2), -2, 3, jnp.int32)
        images = jax.vmap(lambda image, shift: jnp.roll(image, shift, (0, 1)))(images, shifts)
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params, images, labels), opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state, key = optimizer.init(params), random_key(1)
    for number in tqdm(range(steps), "classifier", unit="step", file=sys.stderr):
        indices = batch_indices(0, number, BATCH, len(data.images))
        params, opt_state = step(params, opt_state, data.images[indices], data.labels[indices], jax.random.fold_in(key, number))
    return jax.device_get(params)
