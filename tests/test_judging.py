"""Images as they are judged: how many, how large, and samples at the same levels and places as real images."""

import jax.numpy as jnp
import numpy as np
import pytest

from support import judging
from support.arrays import RowsOnDisk
from support.data import ImageData, to_model_input


def of_size(side: int, count: int = 6, channels: int = 3) -> ImageData:
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, channels), np.uint8)
    return ImageData("made", images, np.arange(count), count, image_size=max(side, 32))


@pytest.mark.parametrize(("side", "channels"), [(28, 1), (32, 3), (64, 3), (50, 1)])
def test_samples_that_are_real_images_are_judged_as_these_are(side, channels):
    data = of_size(side, channels=channels)
    samples = np.asarray(to_model_input(jnp.asarray(data.images), data.image_size))
    np.testing.assert_array_equal(judging.to_bytes(samples, data), judging.comparable(data).images)


def test_small_images_are_judged_as_they_are_and_large_ones_at_32():
    for side in (8, 28, 32):
        data = of_size(side)
        np.testing.assert_array_equal(judging.comparable(data).images, data.images)
    halves = np.zeros((2, 64, 64, 1), np.uint8)
    halves[:, :, 32:] = 200
    small = judging.comparable(ImageData("made", halves, np.zeros(2, np.int32))).images
    assert (small.shape, small.dtype) == ((2, 32, 32, 1), np.uint8)
    assert (small[:, :, :15] == 0).all()
    assert (small[:, :, 17:] == 200).all()


def test_of_many_images_some_are_judged_with_their_labels(monkeypatch):
    monkeypatch.setattr(judging, "MOST", 10)
    data = of_size(8, count=30)
    chosen = judging.comparable(data._replace(images=RowsOnDisk(data.images, np.arange(30))))
    assert len(set(chosen.labels)) == 10
    np.testing.assert_array_equal(chosen.images, data.images[chosen.labels])
