"""Sample sets by batches: npz and folders say the same, name what is wrong, and stay small."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditjax.data import pictures
from ditjax.data.images import given_picture, open_images
from ditjax.errors import FaultError, UserError
from tests.seeded import seeded_images
from tests.unstable import FOR_EVER, PASSING, Unstable

IMAGES = seeded_images((11, 6, 5, 3), 0)


def folder(path, images, suffix="png"):
    for i, image in enumerate(images):
        file = path / f"{'b' if i % 2 else 'a'}" / f"{i:03d}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file)
    return path


def all_of(images, size=4):
    return np.concatenate(list(images.batches(size)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1, 4, 11, 50])
def test_an_npz_by_batches(tmp_path, save, size):
    save(tmp_path / "a.npz", arr_0=IMAGES, label=np.arange(11))
    images = open_images(tmp_path / "a.npz")
    assert (images.count, images.height, images.width) == (11, 6, 5)
    batches = list(images.batches(size))
    assert [len(batch) for batch in batches] == [
        len(IMAGES[i : i + size]) for i in range(0, 11, size)
    ]
    np.testing.assert_array_equal(np.concatenate(batches), IMAGES)
    np.testing.assert_array_equal(all_of(images), IMAGES)  # and a second time


def test_an_npz_in_fortran_order(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.asfortranarray(IMAGES))
    images = open_images(tmp_path / "a.npz")
    np.testing.assert_array_equal(all_of(images), IMAGES)
    assert str(images) == f"11 images of 6x5 in {tmp_path / 'a.npz'}"


def test_arrays_that_are_not_read_are_named(tmp_path):
    """ADM's samples have their labels in arr_1."""
    np.savez(tmp_path / "a.npz", arr_0=IMAGES, arr_1=np.arange(11), label=np.arange(11))
    assert str(open_images(tmp_path / "a.npz")).endswith("; arrays left out: arr_1")


def test_a_folder_in_the_order_of_its_paths(tmp_path):
    images = open_images(folder(tmp_path, IMAGES))
    assert (images.count, images.height, images.width) == (11, 6, 5)
    np.testing.assert_array_equal(all_of(images), np.concatenate([IMAGES[::2], IMAGES[1::2]]))


def test_grey_images_become_rgb(tmp_path):
    grey = IMAGES[:, :, :, :1]
    np.savez(tmp_path / "a.npz", arr_0=grey)
    expected = np.repeat(grey, 3, axis=3)
    np.testing.assert_array_equal(all_of(open_images(tmp_path / "a.npz")), expected)
    images = open_images(folder(tmp_path / "d" / "a", grey[::2]))
    np.testing.assert_array_equal(all_of(images), np.concatenate([expected[::4], expected[2::4]]))


def test_jpegs_hidden_files_and_others(tmp_path):
    flat = np.full((3, 8, 8, 3), 77, np.uint8)
    folder(tmp_path, flat, "JPEG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    Image.fromarray(IMAGES[0]).save(tmp_path / ".hidden" / "x.png")
    Image.fromarray(IMAGES[0]).save(tmp_path / "a" / "._x.png")
    np.testing.assert_array_equal(all_of(open_images(tmp_path)), flat)


def test_palettes_and_alphas_that_hide_nothing(tmp_path):
    image = Image.fromarray(IMAGES[0])
    image.quantize(256).save(tmp_path / "a.png")
    image.convert("RGBA").save(tmp_path / "b.png")
    Image.fromarray(IMAGES[0, :, :, 0] > 127).save(tmp_path / "c.png")
    palette, opaque, binary = all_of(open_images(tmp_path))
    np.testing.assert_array_equal(opaque, IMAGES[0])
    np.testing.assert_allclose(palette.astype(int), IMAGES[0], atol=8)
    np.testing.assert_array_equal(binary[:, :, 2], np.where(IMAGES[0, :, :, 0] > 127, 255, 0))


def of_floats(path):
    Image.fromarray(np.zeros((6, 5), np.float32)).save(path, "TIFF")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (of_floats, "pixels are 32-bit floats: expected 8 or 16 bits"),
        (lambda p: Image.fromarray(IMAGES[0, :, :4]).save(p), r"b\.png is 6x4 and a\.png 6x5"),
        (lambda p: p.write_bytes(b"GIF89a nothing"), r"b\.png is damaged"),
        (lambda p: p.write_bytes(b""), r"b\.png is damaged"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(tmp_path, write, message):
    for name in ("a", "c"):
        Image.fromarray(IMAGES[0]).save(tmp_path / f"{name}.png")
    write(tmp_path / "b.png")
    with pytest.raises(UserError, match=message):
        all_of(open_images(tmp_path))


def test_other_sizes_and_no_images_are_told_before_any_work(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no image: expected files ending in .*\.png"):
        open_images(tmp_path / "empty")
    folder(tmp_path / "mixed", IMAGES)
    Image.fromarray(IMAGES[0, :5]).save(tmp_path / "mixed" / "z.png")
    with pytest.raises(UserError, match=r"z\.png is 5x5 and 000\.png 6x5: expected one size"):
        open_images(tmp_path / "mixed")


def test_a_torn_picture_is_told_when_its_batch_comes(tmp_path):
    big = seeded_images((3, 64, 64, 3), 1)
    folder(tmp_path, big)
    torn = tmp_path / "b" / "001.png"
    torn.write_bytes(torn.read_bytes()[:3000])
    batches = open_images(tmp_path).batches(2)
    np.testing.assert_array_equal(next(batches), big[::2])
    with pytest.raises(UserError, match=r"001\.png is damaged"):
        next(batches)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": IMAGES.astype(np.float32)}, r"arr_0 is float32\[11, 6, 5, 3\], expected u8"),
        ({"arr_0": IMAGES[0]}, r"arr_0 is uint8\[6, 5, 3\]"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"arr_0 is uint8\[11, 3, 6, 5\]"),
        ({"arr_0": IMAGES[:0]}, "holds no image"),
        ({"arr_0": IMAGES[:, :0]}, r"arr_0 is uint8\[11, 0, 5, 3\]"),
        ({"images": IMAGES}, "no array 'arr_0', only images"),
    ],
)
def test_an_npz_that_is_no_sample_set(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        open_images(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(caught.value)


def test_an_npz_with_damaged_pixels_is_told_by_its_last_batch(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=seeded_images((11, 64, 64, 3), 0))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    images = open_images(path)
    with pytest.raises(UserError, match=r"a\.npz is not a whole npz file \(Bad CRC"):
        list(images.batches(3))


def test_batches_of_none(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=IMAGES)
    with pytest.raises(UserError, match="batches of 0 images"):
        next(open_images(tmp_path / "a.npz").batches(0))


READ = r"""
import re, sys
from ditjax.data.images import open_images
def peak():
    # Not getrusage's maximum, which is that of the parent before exec too.
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024
images = open_images(sys.argv[1])
before, total = peak(), 0
for batch in images.batches(500):
    total += int(batch[:, 0, 0, 0].sum())
print(images.count, total, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no peak of memory to read")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_fifty_thousand_images_take_little_memory(tmp_path, save):
    """154 MB of them, read in 25 MB: well below the 300 MB that they may take."""
    images = np.zeros((50_000, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(50_000) % 251
    save(tmp_path / "a.npz", arr_0=images)
    command = [sys.executable, "-c", READ, str(tmp_path / "a.npz")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    count, total, growth = out.split()
    assert (int(count), int(total)) == (50_000, images[:, 0, 0, 0].sum(dtype=int))
    assert float(growth) < 25


def test_other_formats_are_not_opened_whatever_their_name(tmp_path):
    """PIL hands PostScript to a program of its own."""
    for i, name in enumerate(("a.png", "b.jpg")):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / name).write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
        )
        with pytest.raises(UserError, match=f"{name} is damaged, or not an image of"):
            open_images(tmp_path / str(i))


@pytest.mark.parametrize("pillows_own", [False, True])
def test_decompression_bombs(tmp_path, monkeypatch, pillows_own):
    open_images(folder(tmp_path, IMAGES))
    if pillows_own:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 14)
    else:
        monkeypatch.setattr(pictures, "MAX_PIXELS", 29)
    with pytest.raises(UserError, match=r"000\.png is damaged: .*(more than 29 pixels|exceeds)"):
        open_images(tmp_path)


@pytest.mark.parametrize("code", PASSING)
def test_a_fault_of_the_file_system_is_no_damage(tmp_path, monkeypatch, capsys, code):
    expected = all_of(open_images(folder(tmp_path / "f", IMAGES)))
    system = Unstable(monkeypatch, "001.png", 2, code)
    images = open_images(tmp_path / "f")
    system.left = 2
    np.testing.assert_array_equal(all_of(images), expected)
    one = given_picture(tmp_path / "f" / "b" / "001.png", "mask")
    np.testing.assert_array_equal(np.asarray(one), IMAGES[1])
    assert capsys.readouterr().err.count(f"001.png ({os.strerror(code)}): trying again") == 4
    system.left = FOR_EVER
    for read in (
        lambda: open_images(tmp_path / "f"),
        lambda: all_of(images),
        lambda: given_picture(tmp_path / "f" / "b" / "001.png", "mask"),
    ):
        with pytest.raises(FaultError, match=rf"001\.png: {os.strerror(code)}\. Nothing was"):
            read()


def test_what_a_user_names_is_told_as_it_is_seen(tmp_path, capsys):
    """A grey image may have one grey that is transparent, and a file several pages."""
    pages = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 200)]
    pages[0].putpixel((0, 0), 255)
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "a.png", transparency=0)
    assert np.asarray(given_picture(tmp_path / "a.tif", "mask")).max() == 255
    assert np.asarray(given_picture(tmp_path / "a.png", "mask")).min() == 255
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("a.tif: of several frames or pages, whose first is the image")
    assert lines[1].endswith("a.png: with an alpha channel, shown on white")


@pytest.mark.parametrize("name", ["x" * 300, "none.npz"])
def test_a_set_that_is_not_there(name):
    with pytest.raises(UserError, match=f"cannot read {name}: (File name too long|No such file)"):
        open_images(name)
