"""The stream is a pure function of (seed, position), and the pixels are the paper's."""

import itertools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data.crop import center_crop, resize_images
from ditjax.data.records import ImageRecords, load_arrays
from ditjax.data.source import DataSpec, dataset_info
from ditjax.data.stream import epoch_order, flips, records_of_step, train_batches
from ditjax.errors import UserError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def spec(digits_dir):
    """The 359 test digits: a prime, which no batch size here divides."""
    return DataSpec("digits", "test", 8, 1, flip=True, data_dir=digits_dir)


def take(spec, steps, seed=0, batch_size=32, **kwargs):
    with train_batches(spec, seed, batch_size, **kwargs) as batches:
        return list(itertools.islice(batches, steps))


def joined(batches, key):
    return np.concatenate([batch[key] for batch in batches])


def replaced(spec, **kwargs):
    return DataSpec(**{**vars(spec), **kwargs})


# ---- records


def test_load_arrays_are_scikit_learns(digits_dir):
    digits = sklearn.datasets.load_digits()
    rows = {"train": [i for i in range(1797) if i % 5 != 4], "test": list(range(4, 1797, 5))}
    for split, index in rows.items():
        arrays = load_arrays("digits", split, digits_dir)
        assert arrays["image"].dtype == np.uint8
        assert arrays["label"].dtype == np.int32
        pixels = np.floor(digits.images[index] * 15.9375 + 0.5)
        np.testing.assert_array_equal(arrays["image"], pixels[..., None])
        np.testing.assert_array_equal(arrays["label"], digits.target[index])


def test_load_arrays_resizes_and_converts(digits_dir):
    small = load_arrays("digits", "test[:7]", digits_dir)["image"]
    large = load_arrays("digits", "test[:7]", digits_dir, image_size=32, channels=3)["image"]
    assert large.shape == (7, 32, 32, 3)
    for c in range(3):
        np.testing.assert_array_equal(large[..., c : c + 1], resize_images(small, 32))


def test_dataset_info(digits_dir):
    info = dataset_info("digits", "train", digits_dir)
    assert info == ("digits/1.0.0", 1438, 10, tuple("0123456789"), 1)
    assert dataset_info("digits", "train[:10%]", digits_dir).num_examples == 144


def test_missing_split_lists_the_splits(digits_dir):
    for split in ("tran", "train[:10", "train[:0]"):
        with pytest.raises(UserError, match=r"no such split.* test, train") as error:
            dataset_info("digits", split, digits_dir)
        assert "\n" not in str(error.value)


class ImageNetLayout(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """What tensorflow-datasets writes for imagenet2012: its features, shapes and hidden labels."""

    name = "imagenet2012"
    VERSION = tfds.core.Version("5.1.0")

    def __init__(self, files, **kwargs):
        self._files = files
        super().__init__(**kwargs)

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(7), "test": self._generate_examples(-1)}

    def _generate_examples(self, label):
        for path in self._files:
            yield path.name, {"image": path, "label": label, "file_name": path.name}


@pytest.fixture
def imagenet_dir(tmp_path):
    """JPEG and a stray PNG, of RGB, grey and CMYK, all of one colour that each must decode to."""
    files = []
    for i, mode in enumerate(["RGB", "L", "CMYK", "RGBA"]):
        path = tmp_path / f"n0_{i}.JPEG"
        image = Image.new("RGB", (50 + 10 * i, 40), (80, 80, 80)).convert(mode)
        image.save(path, "PNG" if mode == "RGBA" else "JPEG")
        files.append(path)
    folder = tmp_path / "data"
    ImageNetLayout(files, data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_imagenet2012_as_prepared_reads_as_it_is(imagenet_dir):
    assert dataset_info("imagenet2012", "train", imagenet_dir).num_classes == 1000
    spec = DataSpec("imagenet2012", "train", 16, 3, flip=True, data_dir=imagenet_dir)
    (batch,) = take(spec, 1, batch_size=4)
    assert batch["image"].shape == (4, 16, 16, 3)
    assert set(batch["label"]) == {7}
    np.testing.assert_allclose(batch["image"], 80 / 127.5 - 1, atol=3 / 127.5)


def test_hidden_labels_are_refused(imagenet_dir):
    with pytest.raises(UserError, match=r"label -1, outside 0\.\.999"):
        load_arrays("imagenet2012", "test", imagenet_dir, image_size=8)


def test_images_of_many_sizes_need_image_size(imagenet_dir):
    with pytest.raises(UserError, match="give image_size"):
        load_arrays("imagenet2012", "train", imagenet_dir)


def test_sixteen_bit_and_palette_images_keep_their_grey(tmp_path):
    (tmp_path / "f" / "a").mkdir(parents=True)
    deep = np.full((8, 8), 0x4321, np.uint16)
    Image.fromarray(deep).save(tmp_path / "f" / "a" / "deep.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 255, 255, 0x43, 0x43, 0x43])
    palette.save(tmp_path / "f" / "a" / "palette.png")
    for channels in (1, 3):
        arrays = load_arrays(f"folder:{tmp_path / 'f'}", "train", tmp_path / "d", 4, channels)
        np.testing.assert_array_equal(arrays["image"], np.full((2, 4, 4, channels), 0x43, np.uint8))


@pytest.fixture
def breakable_dir(digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path / "data")
    return tmp_path / "data"


def test_a_damaged_record_is_named(breakable_dir):
    file = breakable_dir / "digits/1.0.0/digits-test.array_record-00000-of-00001"
    content = bytearray(file.read_bytes())
    png = content.find(b"\x89PNG")  # of record 0, the first in the file
    content[png + 40 : png + 50] = bytes(10)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"'digits', split 'test': record 0 is damaged") as error:
        load_arrays("digits", "test", breakable_dir)
    assert "\n" not in str(error.value)
    spec = DataSpec("digits", "test", 8, 1, flip=False, data_dir=breakable_dir)
    where = int(np.flatnonzero(epoch_order(5, 0, 359) == 0)[0])
    with train_batches(spec, 5, 1) as batches:
        for _ in range(where):
            next(batches)
        with pytest.raises(UserError, match="record 0 is damaged"):
            next(batches)


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone"])
def test_a_cut_file_is_refused_at_once(breakable_dir, damage):
    file = breakable_dir / "digits/1.0.0/digits-test.array_record-00000-of-00001"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    if damage == "gone":
        file.unlink()
    with pytest.raises(UserError, match=r"digits-test.* should hold 359 records"):
        dataset_info("digits", "test", breakable_dir)
    assert dataset_info("digits", "train", breakable_dir).num_examples == 1438


# ---- crop and size


def halved(pixels):
    """A BOX half of u8[H,W], H and W even, by hand: columns and then rows, each rounded half up."""
    pixels = pixels.astype(int)
    pixels = (pixels[:, ::2] + pixels[:, 1::2] + 1) // 2
    return (pixels[::2] + pixels[1::2] + 1) // 2


def bicubic_matrix(n_in, n_out):
    """Keys' kernel (a = -1/2), widened when shrinking: f64[n_out,n_in], rows sum to 1."""
    scale = max(n_in / n_out, 1.0)
    centre = (np.arange(n_out) + 0.5) * n_in / n_out
    d = np.abs((np.arange(n_in)[None, :] + 0.5 - centre[:, None]) / scale)
    near = 1.5 * d**3 - 2.5 * d**2 + 1
    far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = np.where(d < 1, near, np.where(d < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def test_center_crop_halves_while_it_can_then_crops_the_centre():
    pixels = noise(128, 208)
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 32))
    # 208x128 -> 104x64 -> 52x32, for 64 is at least 2*32; the crop starts at (52 - 32) // 2 = 10.
    np.testing.assert_array_equal(cropped, halved(halved(pixels))[:, 10:42])


@pytest.mark.parametrize(
    ("height", "width", "size"), [(21, 33, 16), (47, 30, 16), (8, 8, 32), (9, 8, 20), (31, 31, 16)]
)
def test_center_crop_scales_by_bicubic(height, width, size):
    pixels = noise(height, width)
    scale = size / min(height, width)
    tall, wide = round(height * scale), round(width * scale)
    scaled = np.clip(pixels @ bicubic_matrix(width, wide).T, 0, 255)
    scaled = np.clip(bicubic_matrix(height, tall) @ scaled, 0, 255)
    top, left = (tall - size) // 2, (wide - size) // 2
    expected = scaled[top : top + size, left : left + size]
    cropped = np.asarray(center_crop(Image.fromarray(pixels), size)).astype(float)
    np.testing.assert_allclose(cropped, expected, atol=1.1)


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_images_is_the_crop_of_each(channels):
    images = np.stack([noise(20, 13 * channels, i).reshape(20, 13, channels) for i in range(3)])
    resized = resize_images(images, 6)
    assert resized.shape == (3, 6, 6, channels)
    assert resized.dtype == np.uint8
    for i, c in itertools.product(range(3), range(channels)):
        alone = center_crop(Image.fromarray(images[i, :, :, c]), 6)
        np.testing.assert_array_equal(resized[i, :, :, c], np.asarray(alone))


def test_resize_images_refuses_other_arrays():
    with pytest.raises(UserError, match="uint8"):
        resize_images(np.zeros((1, 4, 4, 1), np.float32), 2)
    with pytest.raises(UserError, match="channels is 2"):
        resize_images(np.zeros((1, 4, 4, 2), np.uint8), 2)


# ---- the stream


def test_batches_hold_the_records_in_minus_one_to_one(spec):
    arrays = load_arrays("digits", "test", spec.data_dir)
    for batch in take(replaced(spec, flip=False), 4):
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            "image": ((32, 8, 8, 1), "float32"),
            "label": ((32,), "int32"),
            "index": ((32,), "int64"),
        }
        pixels = (batch["image"].astype(np.float64) + 1) * 127.5
        np.testing.assert_allclose(pixels, arrays["image"][batch["index"]], atol=2e-5)
        np.testing.assert_array_equal(batch["label"], arrays["label"][batch["index"]])
        assert batch["image"].min() == -1
        assert batch["image"].max() == 1


def test_every_epoch_holds_every_record_once_in_an_order_of_its_own(spec):
    stream = joined(take(spec, 34), "index")[: 3 * 359].reshape(3, 359)
    for epoch in stream:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(359))
    for one, other in itertools.combinations([*stream, np.arange(359)], 2):
        assert (one == other).sum() <= 10  # one agreement is expected, ten are 1e-7


def test_a_step_tells_its_records_without_its_images(spec):
    # Batches of 800 hold three epochs.
    for size, steps in ((32, 13), (800, 2)):
        for step, batch in enumerate(take(spec, steps, seed=5, batch_size=size), 1):
            found = records_of_step(5, step, size, 359)
            np.testing.assert_array_equal(found, batch["index"])


def test_orders_of_other_seeds_and_epochs_are_unrelated():
    orders = {(s, e): epoch_order(s, e, 359) for s in range(4) for e in range(4)}
    for one, other in itertools.combinations(orders, 2):
        assert (orders[one] == orders[other]).sum() <= 10


def test_a_record_is_anywhere_in_an_epoch_equally_often():
    where = np.array([np.argsort(epoch_order(0, e, 16)) for e in range(4000)])
    counts = np.array([np.bincount(column, minlength=16) for column in where.T])
    chi2 = ((counts - 250.0) ** 2 / 250).sum()
    assert abs(chi2 - 225) < 5 * (2 * 225) ** 0.5  # (16-1)^2 degrees of freedom, five sigma


def test_the_stream_does_not_depend_on_the_batch_size(spec):
    small, large = take(spec, 36, batch_size=20), take(spec, 8, batch_size=90)
    for key in ("image", "label", "index"):
        np.testing.assert_array_equal(joined(small, key), joined(large, key))


@pytest.mark.parametrize("start_step", [1, 11, 40])
def test_starting_at_a_step_equals_reading_up_to_it(spec, start_step):
    for read, started in zip(
        take(spec, start_step + 3)[start_step:],
        take(spec, 3, start_step=start_step),
        strict=True,
    ):
        for key in read:
            np.testing.assert_array_equal(read[key], started[key])


@pytest.mark.parametrize("rows", [np.arange(16, 32), np.array([0, 1, 8, 9, 30, 31])])
def test_a_process_takes_its_rows_of_the_same_batches(spec, rows):
    for part, whole in zip(take(spec, 15, rows=rows), take(spec, 15), strict=True):
        for key in whole:
            np.testing.assert_array_equal(part[key], whole[key][rows])


def test_restarts_with_other_processes_see_every_record_once_an_epoch(spec):
    seen: dict[int, int] = {}
    for start, stop, processes in ((0, 5, 1), (5, 12, 2), (12, 23, 4), (23, 34, 1)):
        for process in range(processes):
            rows = np.arange(32).reshape(-1, processes)[:, process]
            batches = take(spec, stop - start, start_step=start, rows=rows)
            for step, batch in enumerate(batches, start):
                for row, index in zip(rows, batch["index"], strict=True):
                    assert seen.setdefault(32 * step + int(row), int(index)) == index
    stream = np.array([seen[position] for position in range(34 * 32)])
    for epoch in range(3):
        ids = stream[epoch * 359 : (epoch + 1) * 359]
        np.testing.assert_array_equal(np.sort(ids), np.arange(359))


def test_half_the_elements_are_mirrored_and_the_rest_untouched(spec):
    flipped = np.concatenate([b["image"] for b in take(spec, 60)])
    plain = np.concatenate([b["image"] for b in take(replaced(spec, flip=False), 60)])
    same = (flipped == plain).all((1, 2, 3))
    mirrored = (flipped == plain[:, :, ::-1]).all((1, 2, 3))
    assert (same | mirrored).all()
    np.testing.assert_array_equal(mirrored & ~same, flips(0, 0, 60 * 32) & ~(same & mirrored))
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / (60 * 32) ** 0.5


def test_flips_are_by_position_and_independent():
    np.testing.assert_array_equal(flips(3, 0, 1000)[700:], flips(3, 700, 300))
    draws = np.array([flips(seed, 0, 10_000) for seed in range(6)]).astype(float) - 0.5
    correlation = 4 * draws @ draws.T / 10_000 - np.eye(6)
    assert np.abs(correlation).max() < 5 / 100
    for lag in (1, 2, 4, 359):
        assert abs(4 * (draws[:, lag:] * draws[:, :-lag]).mean()) < 5 / 60_000**0.5


def test_cached_and_uncached_are_the_same(spec):
    for cached, uncached in zip(
        take(spec, 14), take(replaced(spec, cache_mb=0, threads=3), 14), strict=True
    ):
        for key in cached:
            np.testing.assert_array_equal(cached[key], uncached[key])


def test_a_cached_record_is_decoded_once_and_an_uncached_one_each_time(spec, monkeypatch):
    read, seen = ImageRecords.read_words, []

    def counted(self, index):
        seen.append(index)
        return read(self, index)

    monkeypatch.setattr(ImageRecords, "read_words", counted)
    # Batches ahead are decoded two at a time: a record at a seam may be met by both threads.
    take(spec, 36)
    assert 359 <= len(seen) <= 359 + 2 * 32
    seen.clear()
    take(replaced(spec, cache_mb=0), 36)
    assert len(seen) >= 36 * 32


def test_a_callers_write_does_not_reach_the_cache(spec):
    with train_batches(spec, 0, 359) as batches:
        first = next(batches)
        kept = first["image"].copy()
        first["image"][:] = 0
        first["label"][:] = 0
        later = next(batches)
    order = np.argsort(later["index"])
    np.testing.assert_array_equal(
        np.sort(later["image"][order].reshape(359, -1), 1),
        np.sort(kept[np.argsort(first["index"])].reshape(359, -1), 1),
    )
    assert len(set(later["label"])) == 10


def test_close_ends_the_threads(spec):
    before = set(threading.enumerate())
    batches = train_batches(replaced(spec, cache_mb=0, threads=2), 0, 32)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    for thread in started:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"rows": np.array([31, 32])}, "rows .31, 32. of a batch of 32"),
        ({"rows": np.array([], int)}, "rows .. of a batch of 32"),
        ({"seed": -1}, "seed -1"),
        ({"start_step": -1}, "start_step -1"),
    ],
)
def test_wrong_arguments(spec, arguments, told):
    with pytest.raises(UserError, match=told):
        train_batches(spec, **{"seed": 0, "batch_size": 32, **arguments})


@pytest.mark.parametrize(
    ("field", "value"), [("channels", 2), ("image_size", 0), ("cache_mb", -1), ("threads", 0)]
)
def test_wrong_spec(spec, field, value):
    with pytest.raises(UserError, match=f"{field} is {value}"):
        replaced(spec, **{field: value})


def test_tensorflow_is_never_imported(tmp_path):
    """Prepare, describe, read and write with a TensorFlow in sight that tells of its import."""
    fake = tmp_path / "fake" / "tensorflow"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    program = (
        "import sys, numpy as np\n"
        "from ditjax.data import latents\n"
        "from ditjax.data.source import DataSpec, dataset_info\n"
        "from ditjax.data.stream import train_batches\n"
        "spec = DataSpec('digits', 'train', 8, 1, True)\n"
        "with train_batches(spec, 0, 64) as batches: next(batches)\n"
        "assert dataset_info('digits', 'test').num_examples == 359\n"
        "zeros = np.zeros((2, 1, 1, 1), np.float32)\n"
        "writer = latents.LatentWriter(sys.argv[1], 'train', (1, 1, 1), ('a',), 1, {})\n"
        "writer.write(range(1), [{'mean': zeros, 'log_variance': zeros, 'label': 0}])\n"
        "writer.finish()\n"
        "assert dataset_info('latents:' + sys.argv[1], 'train').num_examples == 1\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    path = os.pathsep.join([str(tmp_path / "fake"), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "latents")],
        env={**os.environ, "PYTHONPATH": path, "DITJAX_DATA": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
