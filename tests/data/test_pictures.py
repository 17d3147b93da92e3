"""An image is seen alike by training and by evaluation: upright, on white, in RGB."""

import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data.images import given_picture, open_images
from ditjax.data.records import load_arrays
from ditjax.data.source import prepare
from ditjax.errors import UserError

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)


def both(folder):
    """(training's, evaluation's) images u8[N,H,W,3] of folder/f, in the order of their names."""
    name, data = f"folder:{folder / 'f'}", folder / "data"
    sets = open_images(folder / "f")
    scored = np.concatenate(list(sets.batches(4)))
    skip = {"image": tfds.decode.SkipDecoding()}
    raw = prepare(name, data).as_data_source("train", decoders=skip)
    order = np.argsort([raw[k]["file_name"].decode() for k in range(len(raw))])
    return load_arrays(name, "train", data, sets.height, 3)["image"][order], scored


def place(folder, name="0.png"):
    path = folder / "f" / "a" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif", ".JPE"),
    "PNG": (".png", ".PNG"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pnm"),
    "BMP": (".bmp",),
    "WebP": (".webp",),
    "AVIF": (".avif",),
    "JPEG 2000": (".jp2", ".j2k"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format(tmp_path, name):
    for k, suffix in enumerate(FORMATS[name]):
        RGB.save(place(tmp_path, f"{k}{suffix}"), name.replace(" ", "").upper())
    trained, scored = both(tmp_path)
    assert len(trained) == len(FORMATS[name])
    np.testing.assert_array_equal(trained, scored)
    lossless = name not in ("JPEG", "GIF", "WebP", "AVIF", "JPEG 2000")
    np.testing.assert_allclose(trained[0].astype(int), PIXELS, atol=0 if lossless else 255)


def test_the_page_names_the_formats():
    text = DOCS.read_text(encoding="utf-8").partition("### What is seen of an image")[2]
    for name in FORMATS:
        assert name in text


def test_other_decoders_see_no_bytes(tmp_path):
    """PostScript is handed to a program of its own by PIL; TGA has no magic number."""
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n", tga()):
        place(tmp_path).write_bytes(content)
        with pytest.raises(UserError, match=r"is not a sound image \(cannot identify"):
            prepare(f"folder:{tmp_path / 'f'}", tmp_path / "data")
        with pytest.raises(UserError, match="is damaged, or not an image of"):
            open_images(tmp_path / "f")


def tga():
    buffer = io.BytesIO()
    RGB.save(buffer, "TGA")
    return buffer.getvalue()


# ---- orientation

TURNED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", TURNED)
def test_an_image_is_upright(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    RGB.save(place(tmp_path, f"0{suffix}"), exif=exif, lossless=True)
    trained, scored = both(tmp_path)
    np.testing.assert_array_equal(trained[0], TURNED[orientation](PIXELS))
    np.testing.assert_array_equal(scored, trained)


def test_one_that_a_user_names_is_seen_as_all_others(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.save(tmp_path / "turned.png", exif=exif)
    found = given_picture(tmp_path / "turned.png", "control image")
    np.testing.assert_array_equal(np.asarray(found), TURNED[6](PIXELS))
    RGB.save(tmp_path / "x.eps")  # whose decoder starts an outside program
    with pytest.raises(
        UserError, match=r"^control image .*x\.eps is damaged, or not an image of AVIF"
    ):
        given_picture(tmp_path / "x.eps", "control image")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".avif"])
def test_sizes_are_those_of_the_upright_image(tmp_path, suffix, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.crop((0, 0, 4, 6)).save(place(tmp_path, f"0{suffix}"), exif=exif)
    RGB.crop((0, 0, 6, 4)).save(place(tmp_path, f"1{suffix}"))
    images = open_images(tmp_path / "f")
    assert (images.height, images.width) == (4, 6)
    assert sum(map(len, images.batches(1))) == 2
    if suffix != ".tif":  # which Pillow turns itself
        assert "; 1 turned upright by EXIF" in str(images)
        prepare(f"folder:{tmp_path / 'f'}", tmp_path / "data")
        assert "; 1 turned upright by EXIF" in capsys.readouterr().err


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"nonsense"])
def test_damaged_exif_beside_sound_pixels(tmp_path, exif):
    RGB.save(place(tmp_path), exif=exif)
    trained, scored = both(tmp_path)
    np.testing.assert_array_equal(trained[0], PIXELS)
    np.testing.assert_array_equal(scored, trained)


def test_an_orientation_that_is_none(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    RGB.save(place(tmp_path), exif=exif)
    np.testing.assert_array_equal(both(tmp_path)[0][0], PIXELS)


# ---- modes


def with_alpha(mode="RGBA"):
    """The first row transparent over hidden colours, the second half so, the others opaque."""
    image = RGB.convert(mode)
    alpha = np.full((6, 6), 255, np.uint8)
    alpha[0], alpha[1] = 0, 128
    image.putalpha(Image.fromarray(alpha))
    return image


def palette():
    image = RGB.quantize(8)
    hidden = image.getpixel((0, 0))
    return image, hidden, np.asarray(image) == hidden


def colour_key():
    pixels = np.full((6, 6, 3), 90, np.uint8)
    pixels[0] = (1, 2, 3)
    return Image.fromarray(pixels)


def grey16(value=0x4321):
    return Image.fromarray(np.full((6, 6), value, np.uint16))


def check(folder, expected, atol=1):
    trained, scored = both(folder)
    np.testing.assert_array_equal(scored, trained)
    np.testing.assert_allclose(trained[0].astype(int), expected, atol=atol)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_are_white(tmp_path, mode, capsys):
    with_alpha(mode).save(place(tmp_path))
    expected = np.asarray(RGB.convert(mode).convert("RGB")).astype(int)
    expected[0], expected[1] = 255, (expected[1] + 255) / 2
    check(tmp_path, expected, atol=2)
    assert "; 1 with an alpha channel, shown on white" in capsys.readouterr().err
    assert "; 1 with an alpha channel, shown on white" in str(open_images(tmp_path / "f"))


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    image, hidden, where = palette()
    image.save(place(tmp_path), transparency=hidden)
    check(tmp_path, np.where(where[..., None], 255, np.asarray(image.convert("RGB"))), atol=0)


def test_a_colour_key_is_white(tmp_path):
    colour_key().save(place(tmp_path), transparency=(1, 2, 3))
    expected = np.full((6, 6, 3), 90)
    expected[0] = 255
    check(tmp_path, expected, atol=0)


def test_a_key_of_16_bits_is_white(tmp_path):
    pixels = np.full((6, 6), 0x4321, np.uint16)
    pixels[0] = 7
    Image.fromarray(pixels).save(place(tmp_path), transparency=7)
    expected = np.full((6, 6, 3), 0x43)
    expected[0] = 255
    check(tmp_path, expected, atol=0)


MODES = {
    "1": (RGB.convert("1"), ".png", 0),
    "L": (RGB.convert("L"), ".png", 0),
    "P": (RGB.quantize(8), ".png", 0),
    "RGBA": (RGB.convert("RGBA"), ".png", 0),
    "CMYK": (RGB.convert("CMYK"), ".tif", 0),
    "CMYK in a JPEG": (Image.new("RGB", (6, 6), (80, 80, 80)).convert("CMYK"), ".jpg", 3),
    "YCbCr": (RGB.convert("YCbCr"), ".tif", 4),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode(tmp_path, mode):
    image, suffix, atol = MODES[mode]
    image.save(place(tmp_path, f"0{suffix}"))
    check(tmp_path, np.asarray(image.convert("RGB")).astype(int), atol)


def test_the_upper_8_of_16_bits(tmp_path, capsys):
    grey16().save(place(tmp_path))
    grey16().save(place(tmp_path, "1.tif"))
    grey16().save(place(tmp_path, "2.pgm"))
    check(tmp_path, np.full((6, 6, 3), 0x43), atol=0)
    assert "; 3 of 16 bits, read by the upper 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((6, 6), np.float32), "pixels are 32-bit floats: expected 8 or 16 bits"),
        (np.full((6, 6), 1 << 20, np.int32), "pixels are 32-bit integers: expected 8 or 16 bits"),
        (np.full((6, 6), -1, np.int32), "pixels are 32-bit integers: expected 8 or 16 bits"),
    ],
)
def test_pixels_whose_white_is_unknown_are_refused_by_both(tmp_path, pixels, message):
    Image.fromarray(pixels).save(place(tmp_path, "0.tif"))
    with pytest.raises(UserError, match=message):
        prepare(f"folder:{tmp_path / 'f'}", tmp_path / "data")
    with pytest.raises(UserError, match=message):
        next(open_images(tmp_path / "f").batches(1))


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_of_several_frames_the_first(tmp_path, suffix, capsys):
    more = [Image.new("RGB", (6, 6), "red")]
    flat = Image.new("RGB", (6, 6), (0, 0, 255))
    flat.save(place(tmp_path, f"0{suffix}"), save_all=True, append_images=more, lossless=True)
    check(tmp_path, np.asarray(flat).astype(int), atol=2)
    line = "; 1 of several frames or pages, whose first is the image"
    assert line in capsys.readouterr().err
    assert line in str(open_images(tmp_path / "f"))
