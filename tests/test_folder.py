"""Which files of a folder are taken for images, and what it sees in them."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from support import image_folder

GREY, COLOUR = 0, 2


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: bytes, depth: int, kind: int, *chunks: bytes, width: int = 1) -> bytes:
    """One row of pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + chunk(b"IEND", b"")
    )


def halves() -> np.ndarray:
    """Neither symmetric nor square once turned: black, with white in one corner and grey in another."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:2, :4], image[:2, 6:] = 255, 128
    return image


def read(folder: Path, size: int = 8, channels: int = 3) -> np.ndarray:
    return image_folder.read_images(folder, size, channels)[0]


def test_pictures_are_read_as_a_person_sees_them(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "b.png")
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "c.png")
    clear, grey = read(tmp_path)
    assert (clear == 255).all()
    assert (grey == 128).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path, turn):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    Image.fromarray(halves()).save(tmp_path / "x.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))
    np.testing.assert_array_equal(read(tmp_path)[0], np.asarray(expected))


def exif_with(tag: int, kind: int, turn: int = 6) -> bytes:
    """The orientation, then 'text' in a field that holds something else."""
    entries = struct.pack("<HHIHH", ExifTags.Base.Orientation, 3, 1, turn, 0) + struct.pack("<HHI", tag, kind, 4) + b"tex\0"
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)


@pytest.mark.parametrize(
    "exif", [exif_with(ExifTags.Base.XResolution, 2), exif_with(ExifTags.Base.ImageWidth, 2)], ids=["XResolution", "ImageWidth"]
)
def test_of_odd_exif_data_the_orientation_is_read(tmp_path, exif):
    Image.fromarray(halves()).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path)[0], np.rot90(halves(), -1))


@pytest.mark.parametrize("exif", [b"nonsense", b"II*\0", b"II*\0\xff\xff\xff\xff"])
def test_damaged_exif_data_leaves_the_picture_as_it_is(tmp_path, exif):
    Image.fromarray(halves()).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path)[0], halves())


CLEAR = {
    "1 bit of grey": (1, (1,), b"\x80", b"\0", 0),
    "2 bits of grey": (2, (1,), b"\x40", b"\x80", 170),
    "4 bits of grey": (4, (1,), b"\x10", b"\x40", 68),
    "8 bits of grey": (8, (1,), b"\1", b"\x40", 64),
    "16 bits of grey": (16, (0x102,), b"\1\2", b"\x40\x40", 64),
    "8 bits of colour": (8, (1, 2, 3), b"\1\2\3", b"\x40" * 3, 64),
    "16 bits of colour": (16, (0x102, 0x203, 0x304), b"\1\2\2\3\3\4", b"\x40" * 6, 64),
}


@pytest.mark.parametrize("case", CLEAR)
def test_the_transparent_colour_of_a_png_becomes_white_and_no_other_does(tmp_path, case):
    depth, colour, clear, other, grey = CLEAR[case]
    chunks = {"a": chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour)), "b": b""}
    for name, extra in chunks.items():
        for number, pixel in enumerate((clear, other)):
            (tmp_path / f"{name}{number}.png").write_bytes(png(pixel, depth, GREY if len(colour) == 1 else COLOUR, extra))
    whitened, kept, opaque, same = read(tmp_path, 1)
    assert (whitened == 255).all()
    assert (kept == grey).all()
    assert case == "1 bit of grey" or (opaque < 128).all()
    assert (same == grey).all()


JUNK = [".thumbnails/x.png", ".ipynb_checkpoints/x-checkpoint.png", ".Trash-1000/files/x.png", "$RECYCLE.BIN/x.png", "._a.png"]
JUNK += ["__MACOSX/x.png", "sub/lost+found/x.png", "sub/.hidden/deep/x.png", "sub/@eaDir/x.png"]
JUNK += ["System Volume Information/x.png"]


def test_hidden_files_and_those_of_thumbnails_and_trash_are_not_taken(tmp_path):
    for name in ["a.png", "sub/b.PNG", *JUNK]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(halves()).save(tmp_path / name, "png")
    (tmp_path / "folder.png").mkdir()
    assert len(read(tmp_path)) == 2


def test_a_hidden_folder_that_is_asked_for_is_taken(tmp_path):
    (tmp_path / ".photos").mkdir()
    Image.fromarray(halves()).save(tmp_path / ".photos" / "a.png")
    assert len(read(tmp_path / ".photos")) == 1


def test_links_are_followed_and_each_folder_is_taken_once(tmp_path):
    for place in ("photos", "elsewhere/deep"):
        (tmp_path / place).mkdir(parents=True)
    for name in ("photos/a.png", "elsewhere/b.png", "elsewhere/deep/c.png", "d.png"):
        Image.fromarray(halves()).save(tmp_path / name)
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "linked.png").symlink_to(tmp_path / "d.png")
    assert len(read(tmp_path / "photos")) == 4


def damaged_png() -> bytes:
    """The name of its second part is damaged."""
    pixels = np.random.default_rng(0).bytes(3 * 64)
    data = zlib.compress(b"\0" + pixels)
    whole, part = png(pixels, 8, COLOUR, width=64), chunk(b"IDAT", data)
    assert part in whole
    return whole.replace(part, chunk(b"IDAT", data[:50]) + chunk(b"\0DAT", data[50:]))


DAMAGED = {"cut.png": lambda whole: whole[:60], "empty.png": lambda _: b"", "text.png": lambda _: b"text\nand more"}
DAMAGED |= {"second.png": lambda _: damaged_png(), "huge.png": lambda _: png(b"", 1, GREY, width=2**31 - 1)}


def test_a_few_files_that_cannot_be_read_are_named_and_left_out(tmp_path):
    Image.fromarray(halves()).save(tmp_path / "0.png")
    whole = (tmp_path / "0.png").read_bytes()
    for number in range(1, 114):
        (tmp_path / f"{number}.png").write_bytes(whole)
    for name, damage in DAMAGED.items():
        (tmp_path / name).write_bytes(damage(whole))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.warns(UserWarning, match=r"^6 of 120 images cannot be read and are left out: .*cut.png .*, \.\.\.$"):
        assert len(read(tmp_path)) == 114
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"^6 of 119 images cannot be read, and at most 5% may be left out: .*cut.png"):
        read(tmp_path)


@pytest.mark.parametrize("name", DAMAGED)
def test_each_file_that_cannot_be_read_is_named(tmp_path, name):
    Image.fromarray(halves()).save(tmp_path / name)
    (tmp_path / name).write_bytes(DAMAGED[name]((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"^1 of 1 images cannot be read, .*{name} [^\n]*$"):
        read(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    def refuse(place, scandir=os.scandir):
        if Path(place).name == "private":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    (tmp_path / "private").mkdir()
    Image.fromarray(halves()).save(tmp_path / "a.png")
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="private"):
        read(tmp_path)


def test_grey_is_asked_for_by_its_channels(tmp_path):
    Image.new("RGB", (9, 5), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "b.png")
    red, clear = read(tmp_path, channels=1)
    assert red.shape == (8, 8, 1)
    assert (red == 76).all()  # 0.299 of 255 (ITU-R 601)
    assert (clear == 255).all()


def test_a_folder_in_the_folder_is_a_class_if_no_image_is_beside_it(tmp_path):
    for place in ("b", "a/deep", "a"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "x.png")
    (tmp_path / "no images").mkdir()

    def classes() -> tuple[list[int], int]:
        labels, count = image_folder.classes_of(tmp_path, image_folder.read_images(tmp_path, 8, 3)[1])
        return list(labels), count

    assert classes() == ([0, 0, 1], 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "beside.png")
    assert classes() == ([0, 0, 0, 0], 0)
    assert image_folder.classes_of(tmp_path, [tmp_path / "a" / "x.png"] * 2)[1] == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_and_mode_are_taken(tmp_path, channels):
    (tmp_path / "more").mkdir()
    for number, (size, mode) in enumerate(
        [((40, 30), "RGB"), ((16, 64), "L"), ((20, 20), "RGBA"), ((9, 9), "P"), ((5, 8), "1")]
    ):
        colour = {"RGB": (200,) * 3, "RGBA": (200, 200, 200, 255), "1": 1}.get(mode, 200)
        Image.new(mode, size, colour).save(tmp_path / ("more" if number % 2 else ".") / f"{number}.png")
    levels = [np.unique(image).tolist() for image in read(tmp_path, 8, channels)]
    assert sorted(levels)[1:] == [[200], [200], [200], [255]]  # the other one has an empty palette
    assert read(tmp_path, 8, channels).shape == (5, 8, 8, channels)
