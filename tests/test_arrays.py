"""Images in a .npy or .npz file: what is taken, what is refused in one line, and which rows are read."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from support import arrays, data

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)


def test_the_splits_are_nine_tenths_and_the_other_one(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    train, test = (data.load_dataset(str(tmp_path / "x.npy"), split=split) for split in ("train", "test"))
    assert (len(train.images), len(test.images)) == (36, 4)
    together = np.concatenate([train.images[:], test.images[:]])
    assert sorted(map(bytes, together)) == sorted(map(bytes, IMAGES))
    assert (train.num_classes, train.image_size, train.name) == (0, 8, str(tmp_path / "x.npy"))


def test_a_npy_stays_in_its_file_and_a_npz_does_not(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    np.savez(tmp_path / "x.npz", images=IMAGES)
    mapped, held = (data.load_dataset(str(tmp_path / name)) for name in ("x.npy", "x.npz"))
    assert isinstance(mapped.images, arrays.RowsOnDisk)
    assert isinstance(mapped.images.array, np.memmap)
    assert mapped.images.shape == held.images.shape == (36, 8, 8, 3)
    assert mapped.checksum == held.checksum
    for index in (slice(3, 9), np.array([5, 0, 5]), 7, slice(None)):
        np.testing.assert_array_equal(mapped.images[index], held.images[index])


def test_labels_stay_with_their_images(tmp_path):
    labels = np.arange(40) % 7
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=labels)
    of = {bytes(image): label for image, label in zip(IMAGES, labels, strict=True)}
    for split in ("train", "test"):
        loaded = data.load_dataset(str(tmp_path / "x.npz"), split=split)
        assert loaded.num_classes == 7
        assert [of[bytes(image)] for image in loaded.images] == list(loaded.labels)


@pytest.mark.parametrize(("shape", "size"), [((20, 28, 28), 32), ((9, 64, 64, 3), 64)])
def test_the_size_is_that_of_the_images_and_28_is_padded(tmp_path, shape, size):
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    loaded = data.load_dataset(str(tmp_path / "x.npy"))
    assert loaded.image_size == size
    assert loaded.images.shape[1:] == (*shape[1:3], shape[3] if len(shape) == 4 else 1)
    assert data.load_dataset(str(tmp_path / "x.npy"), image_size=80).image_size == 80


@pytest.mark.parametrize(("side", "size"), [(8, 8), (28, 32), (7, 12)])
def test_images_are_scaled_and_padded_with_black_on_all_sides(variant, side, size):
    images = jnp.full((2, side, side, 3), 255, jnp.uint8).at[0].set(51)
    x, first = variant(partial(data.to_model_input, image_size=size))(images), (size - side) // 2
    expected = np.full((2, size, size, 3), -1, np.float32)
    expected[:, first : first + side, first : first + side] = np.reshape([-0.6, 1], (2, 1, 1, 1))
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, expected, rtol=1e-6)


def test_a_checksum_notices_every_change():
    labels = np.zeros(40, np.int32)
    changed, moved, labelled = IMAGES.copy(), IMAGES.copy(), labels.copy()
    changed[39, 7, 7, 2] ^= 1
    moved[[0, 1]] = moved[[1, 0]]
    labelled[3] = 1
    kinds = [(IMAGES, labels), (changed, labels), (moved, labels), (IMAGES, labelled), (IMAGES.reshape(40, 8, 4, 6), labels)]
    assert len({arrays.checksum(*kind) for kind in kinds}) == len(kinds)


WRONG = {
    "x.npy": {
        "floats": IMAGES / np.float32(255),
        "a vector": IMAGES.ravel(),
        "no images": IMAGES[:0],
        "four channels": np.zeros((9, 8, 8, 4), np.uint8),
        "an oblong": np.zeros((9, 8, 6, 3), np.uint8),
        "objects": np.array([{}], object),
    },
    "x.npz": {
        "other names": {"x": IMAGES},
        "nothing": {},
        "too few labels": {"images": IMAGES, "labels": np.arange(39)},
        "labels that are no numbers": {"images": IMAGES, "labels": np.full(40, "a")},
        "a label below 0": {"images": IMAGES, "labels": np.arange(40) - 1},
        "labels between numbers": {"images": IMAGES, "labels": np.arange(40) / 2},
    },
}


@pytest.mark.parametrize(("name", "what"), [(name, what) for name in WRONG for what in WRONG[name]])
def test_other_arrays_are_refused_in_one_line(tmp_path, name, what):
    file, content = tmp_path / name, WRONG[name][what]
    np.savez(file, **content) if name == "x.npz" else np.save(file, content, allow_pickle=True)
    with pytest.raises(ValueError, match=f"^--dataset must [^\n]*{file} [^\n]*$"):
        data.load_dataset(str(file))


@pytest.mark.parametrize(("name", "damage"), [*(("x.npy", how) for how in ("gone", "empty", "text", "cut")), ("x.npz", "cut")])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name, damage):
    file = tmp_path / name
    np.savez(file, images=IMAGES) if name == "x.npz" else np.save(file, IMAGES)
    content = {"gone": b"", "empty": b"", "text": b"text\nand more", "cut": file.read_bytes()[:3000]}[damage]
    file.write_bytes(content)
    if damage == "gone":
        file.unlink()
    with pytest.raises(ValueError, match=f"^--dataset must [^\n]*{file} cannot be read [^\n]*$"):
        data.load_dataset(str(file))


def test_a_size_below_that_of_the_images_and_other_channels_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    with pytest.raises(ValueError, match=r"^--image-size must be at least 8, the size of the images of .*x\.npy, got 6$"):
        data.load_dataset(str(tmp_path / "x.npy"), image_size=6)
    with pytest.raises(ValueError, match=r"^--channels must be 3, as the images of .*x\.npy have, got 1$"):
        data.load_dataset(str(tmp_path / "x.npy"), channels=1)
