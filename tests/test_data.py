import functools
import gzip
import http.server
import io
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets import core, features
from tensorflow_datasets.core import constants, registered
from tensorflow_datasets.image_classification import mnist

from support import batches, data, tfds

SIZES = {"train": 30, "t10k": 10}


@pytest.fixture(autouse=True)
def tensorflow_stays_out():
    yield
    assert "tensorflow" not in sys.modules


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A host on this machine with four small files in MNIST's format, and the images that they hold."""
    folder, rng = tmp_path_factory.mktemp("www"), np.random.default_rng(0)
    images = {split: rng.integers(0, 256, (n, 28, 28), np.uint8) for split, n in SIZES.items()}
    for split, n in SIZES.items():
        header, labels = struct.pack(">4I", 0x803, n, 28, 28), np.arange(n, dtype=np.uint8) % 10
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images[split].tobytes()))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">2I", 0x801, n) + labels.tobytes()))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", images["train"]
        server.shutdown()


@pytest.fixture
def reachable(source, monkeypatch):
    monkeypatch.setattr(mnist.MNIST, "URL", source[0])
    return source[1]


@pytest.fixture
def out_of_reach(monkeypatch):
    with socket.socket() as unused:  # a port that nothing listens on
        unused.bind(("127.0.0.1", 0))
        for dataset in (mnist.MNIST, mnist.FashionMNIST):
            monkeypatch.setattr(dataset, "URL", f"http://127.0.0.1:{unused.getsockname()[1]}/")
        yield


def check_images(loaded, images):
    """TFDS shuffles when it prepares, so compare as sets; the label was the example's number, modulo 10."""
    assert loaded.name == "mnist"
    assert loaded.images.shape == (30, 28, 28, 1)
    assert loaded.images.dtype == np.uint8
    found = {image.tobytes(): label for image, label in zip(loaded.images[..., 0], loaded.labels, strict=True)}
    assert found == {image.tobytes(): number % 10 for number, image in enumerate(images)}


def test_mnist_is_downloaded_once_and_then_read(reachable, tmp_path, monkeypatch, request):
    check_images(data.load_dataset("auto", tmp_path), reachable)
    request.getfixturevalue("out_of_reach")
    check_images(data.load_dataset("mnist", tmp_path), reachable)


def prepare(data_dir, file_format) -> Path:
    """Prepare MNIST and, for tfrecord, rewrite it in TFDS's default format; the file of the training split is returned."""
    from array_record.python.array_record_module import ArrayRecordReader

    data.load_dataset("mnist", data_dir)
    (folder,) = (data_dir / "mnist").iterdir()
    if file_format == "tfrecord":
        info = json.loads((folder / "dataset_info.json").read_text()) | {"fileFormat": "tfrecord"}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        for file in folder.glob("*.array_record-*"):
            records = ArrayRecordReader(str(file)).read_all()
            framed = b"".join(struct.pack("<QI", len(r), 0) + r + struct.pack("<I", masked_crc32c(r)) for r in records)
            (folder / file.name.replace("array_record", "tfrecord")).write_bytes(framed)
            file.unlink()
    (file,) = folder.glob(f"*train.{file_format}-*")
    return file


def masked_crc32c(record: bytes) -> int:
    """By long division, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in record:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_a_directory_in_tfds_default_format_is_read(reachable, tmp_path):
    assert masked_crc32c(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF  # RFC 3720's
    prepare(tmp_path, "tfrecord")
    check_images(data.load_dataset("mnist", tmp_path), reachable)


def complaint(data_dir, images) -> str | None:
    """What loading says is wrong, or None after it gave what it should."""
    try:
        check_images(data.load_dataset("auto", data_dir), images)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_damaged_records_are_an_error_or_change_nothing(reachable, tmp_path, file_format):
    file, rng = prepare(tmp_path, file_format), np.random.default_rng(0)
    whole = file.read_bytes()
    end = len(whole.rstrip(b"\0"))
    places = rng.integers(0, end, 40)
    damages = [bytes([*whole[:at], whole[at] ^ 1 << at % 8, *whole[at + 1 :]]) for at in places]
    complaints = []
    for damage in [*damages, *(whole[: at * 2 // 3] for at in places[:5]), b""]:
        file.write_bytes(damage)
        complaints += filter(None, [complaint(tmp_path, reachable)])
    assert len(complaints) > 20
    for text in complaints:
        assert re.fullmatch(r"mnist in .* is damaged: remove .*/mnist, and it is prepared again \(.+\)", text)


def test_decoded_arrays_are_kept_and_made_again_where_they_are_damaged_or_old(reachable, tmp_path, monkeypatch):
    file = prepare(tmp_path, "array_record")
    kept = file.with_name("diffusion_jax_train.npz")
    whole, rng = kept.read_bytes(), np.random.default_rng(0)

    def decodes() -> bool:
        decoded, read = [], tfds._read_examples
        with monkeypatch.context() as patch:
            patch.setattr(tfds, "_read_examples", lambda *args: decoded.append(args) or read(*args))
            check_images(data.load_dataset("mnist", tmp_path), reachable)
        return bool(decoded)

    assert not decodes()
    for at in [*range(0, 400, 5), *rng.integers(0, len(whole), 40)]:
        kept.write_bytes(bytes([*whole[:at], whole[at] ^ 1 << at % 8, *whole[at + 1 :]]))
        decodes()
        assert not decodes()
    for other in (b"", whole[:1000]):
        kept.write_bytes(other)
        assert decodes()
    os.utime(file, (0, 0))
    assert decodes()
    assert {path.name for path in file.parent.iterdir() if "diffusion_jax" in path.name} == {kept.name}


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_descriptions_are_an_error_or_change_nothing(reachable, tmp_path, name):
    file = prepare(tmp_path, "array_record").parent / name
    whole = file.read_text()
    for damage in (whole[:-20], whole.replace('"', "?", 3), "", "[]", "{}"):
        file.write_text(damage)
        assert "is damaged: remove" in (complaint(tmp_path, reachable) or "is damaged: remove")


def test_the_test_split_is_the_other_one(reachable, tmp_path):
    prepare(tmp_path, "array_record")
    train, test = (data.load_dataset("mnist", tmp_path, split) for split in ("train", "test"))
    assert len(test.images) == SIZES["t10k"]
    assert sorted(test.labels) == list(range(10))
    assert not {image.tobytes() for image in test.images} & {image.tobytes() for image in train.images}


def test_without_mnist_auto_warns_once_and_falls_back_in_time(out_of_reach, tmp_path):
    start = time.monotonic()
    with pytest.warns(UserWarning, match="using scikit-learn's digits instead of MNIST: mnist is not prepared in") as warned:
        loaded = data.load_dataset("auto", tmp_path)
    assert len([w for w in warned if "MNIST" in str(w.message)]) == 1
    assert time.monotonic() - start < 15
    assert loaded.name == "digits"
    assert not list(tmp_path.iterdir())


def test_a_host_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "SECONDS_TO_REACH", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(mnist.MNIST, "URL", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(data.DataUnavailable, match="cannot be downloaded"):
            data.load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_a_data_set_asked_for_by_name_is_never_replaced(out_of_reach, tmp_path, name):
    with pytest.raises(data.DataUnavailable, match=f"{name} is not prepared in .* and cannot be downloaded"):
        data.load_dataset(name, tmp_path)


def test_the_default_directory_is_that_of_tfds(out_of_reach, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(data.DataUnavailable, match=f"not prepared in {tmp_path}"):
        data.load_dataset("mnist")


def test_the_embedded_digits_are_images_of_digits():
    splits = [data.load_dataset("digits", split=split) for split in ("train", "test")]
    assert [len(loaded.images) for loaded in splits] == [1500, 297]
    loaded = data.ImageData("digits", *(np.concatenate(parts) for parts in list(zip(*splits, strict=True))[1:3]))
    assert loaded.images.shape == (1797, 28, 28, 1)
    assert np.bincount(loaded.labels).min() > 170
    assert loaded.images[:, :4].max() == 0
    assert loaded.images.max() == 255
    means = np.stack([loaded.images[loaded.labels == label].mean(0) for label in range(10)]).reshape(10, -1)
    distances = ((loaded.images.reshape(1797, 1, -1) - means[None]) ** 2).sum(-1)
    assert (distances.argmin(1) == loaded.labels).mean() > 0.85  # the nearest class mean is the label


def made(data_dir: Path, splits: dict[str, list[dict]], **parts) -> str:
    """The name of a data set of `splits`, prepared in array_record as TFDS itself would."""
    with registered.skip_registration():
        members = {
            "VERSION": core.Version("1.0.0"),
            "pkg_dir_path": data_dir,  # otherwise TFDS searches for the class's package
            "_info": lambda self: self.dataset_info_from_configs(features=features.FeaturesDict(parts)),
            "_split_generators": lambda self, _: {split: enumerate(rows) for split, rows in splits.items()},
            "_generate_examples": lambda self: None,
        }
        builder = type("Made", (core.GeneratorBasedBuilder,), {"name": "made", **members})
    builder(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return "made"


def colours(count: int, *shape: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *shape, 3), np.uint8))


def as_png(image: np.ndarray) -> io.BytesIO:
    """A file, since TFDS encodes arrays by TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


def test_any_data_set_that_tfds_has_prepared_is_read_without_its_code(tmp_path):
    images = colours(30, 12, 12)
    rows = [{"image": as_png(image), "label": number % 3} for number, image in enumerate(images)]
    splits = {"train": rows[:20], "test": rows[20:]}
    name = made(tmp_path, splits, image=features.Image(shape=(12, 12, 3)), label=features.ClassLabel(num_classes=3))
    of = {bytes(image): number % 3 for number, image in enumerate(images)}
    for _ in range(2):  # decoded, and as it was kept
        for split in splits:
            loaded = data.load_dataset(name, tmp_path, split)
            assert (loaded.name, loaded.num_classes, loaded.image_size, loaded.checksum) == ("made", 3, 12, None)
            assert {bytes(image) for image in loaded.images} == set(
                map(bytes, images[:20] if split == "train" else images[20:])
            )
            assert [of[bytes(image)] for image in loaded.images] == list(loaded.labels)


def test_of_a_data_set_without_a_test_split_a_tenth_is_held_out(tmp_path):
    images = colours(30, 12, 12)
    name = made(tmp_path, {"train": [{"image": as_png(image)} for image in images]}, image=features.Image(shape=(12, 12, 3)))
    train, test = (data.load_dataset(name, tmp_path, split) for split in ("train", "test"))
    assert (len(train.images), len(test.images), train.num_classes) == (27, 3, 0)
    assert sorted(map(bytes, [*train.images, *test.images])) == sorted(map(bytes, images))


def test_images_of_different_sizes_are_cropped_and_scaled_to_the_size_that_is_asked_for(tmp_path):
    images = [np.full((8 + number, 20, 3), 9 * number, np.uint8) for number in range(20)]
    rows = [{"image": as_png(image)} for image in images]
    name = made(tmp_path, {"train": rows}, image=features.Image(shape=(None, None, 3)))
    with pytest.raises(ValueError, match=r"^--image-size must be given: the images of made are not of one square size, got 0$"):
        data.load_dataset(name, tmp_path)
    for channels in (1, 3, 1):
        loaded = data.load_dataset(name, tmp_path, image_size=6, channels=channels)
        assert loaded.images.shape == (18, 6, 6, channels)
        assert set(np.ptp(loaded.images, axis=(1, 2, 3))) == {0}
        assert {int(image[0, 0, 0]) for image in loaded.images} < {9 * number for number in range(20)}


def test_a_data_set_of_something_else_is_refused_in_one_line(tmp_path):
    name = made(tmp_path, {"train": [{"text": "a"}]}, text=features.Text())
    with pytest.raises(ValueError, match=r"^--dataset must be a data set of grey or colour images \(`image`\) .*, got made$"):
        data.load_dataset(name, tmp_path)
    (file,) = tmp_path.glob("made/1.0.0/features.json")
    file.write_text("{")
    with pytest.raises(ValueError, match=r"^made in .* is damaged: remove .*/made, and prepare it again \([^\n]*\)$"):
        data.load_dataset(name, tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "", " ", "../made", "no/such/folder", "made/", "\0", "ä", "*"])
def test_a_name_that_is_nothing_is_told_what_it_may_be(tmp_path, name):
    with pytest.raises(ValueError, match=r"^the data set must be one of auto, mnist, .* tfds build NAME") as problem:
        data.load_dataset(name, tmp_path)
    assert str(problem.value).endswith(f"got {name!r}")


def test_each_epoch_is_a_fresh_permutation():
    indices = np.concatenate([batches.batch_indices(0, step, 4, 10) for step in range(5)])
    first, second = indices[:10], indices[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(batches.batch_indices(0, 3, 4, 10), indices[12:16])
    assert not np.array_equal(np.concatenate([batches.batch_indices(1, step, 4, 10) for step in range(5)]), indices)


def test_a_batch_may_be_larger_than_the_data():
    counts = np.bincount(batches.batch_indices(0, 0, 25, 10), minlength=10)
    assert set(counts) == {2, 3}
