"""A small classifier, whose features say how alike two sets of images are; trained once on a data set's training split."""

import os
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree, UInt8
from machine import random_key
from tqdm import tqdm

from diffusion_jax.data import ImageData, batch_indices
from diffusion_jax.layers import Conv3x3, Dense

EPOCHS, BATCH, FEATURES = 4, 100, 64


class Classifier(nn.Module):
    """The features [B, FEATURES] and the logits [B, 10] of images [B, 28, 28, 1], bytes."""

    @nn.compact
    def __call__(self, images: UInt8[Array, "B 28 28 1"]) -> tuple[Float[Array, "B F"], Float[Array, "B 10"]]:
        x = images.astype(jnp.float32) / 127.5 - 1
        for number, width in enumerate((32, 64, 128)):
            x = nn.relu(nn.LayerNorm()(Conv3x3(width, jnp.float32, name=f"conv_{number}")(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        features = Dense(FEATURES, jnp.float32, name="features")(x.reshape(len(x), -1))
        return features, Dense(10, jnp.float32, name="logits")(nn.relu(features))


def apply(params: PyTree, images: UInt8[Array, "B 28 28 1"]) -> tuple[Array, Array]:
    features_and_logits: Any = Classifier().apply({"params": params}, images)
    return features_and_logits


Classify = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def trained_classifier(data: ImageData, test: ImageData) -> tuple[Classify, float]:
    """classify(images) -> (features, labels), and its accuracy on the test split; kept in ~/.cache/diffusion_jax,
    for these images and this file."""
    made_of = zlib.crc32(Path(__file__).read_bytes() + data.images.tobytes())
    file = Path(os.path.expanduser(f"~/.cache/diffusion_jax/classifier_{data.name}_{made_of:08x}.npz"))
    params = _load(file)
    if params is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        params = _train(data)
        with file.with_suffix(f".{os.getpid()}").open("wb") as out:
            np.savez(out, **flatten_dict(params, sep="/"))  # pyright: ignore[reportArgumentType]
        os.replace(out.name, file)

    @jax.jit
    def forward(images):
        features, logits = apply(params, images)
        return features, logits.argmax(-1)

    def classify(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [forward(images[i : i + 500]) for i in range(0, len(images), 500)]
        features, labels = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(labels)

    return classify, float((classify(test.images)[1] == test.labels).mean())


def _load(file: Path) -> dict | None:
    try:
        with np.load(file, allow_pickle=False) as saved:
            return unflatten_dict(dict(saved), sep="/")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # not there, or not whole
        return None


def _train(data: ImageData) -> dict:
    """Adam, and a shift of up to two pixels for each image."""
    steps = EPOCHS * max(len(data.images), 15_000) // BATCH
    optimizer = optax.adam(optax.cosine_onecycle_schedule(steps, 3e-3))
    params = jax.jit(Classifier().init)(random_key(0), data.images[:1])["params"]

    def loss_fn(params, images, labels):
        logits = apply(params, images)[1]
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
