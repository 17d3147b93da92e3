"""Damaged records: named, and skipped up to a cap, by a stream that stays a pure function."""

import itertools
import shutil

import numpy as np
import pytest
from PIL import Image

from ditjax.data import builders, crop, stream
from ditjax.data.latents import LatentWriter
from ditjax.data.records import _Source
from ditjax.data.source import DataSpec, dataset_info, prepare
from ditjax.data.stream import epoch_order, flips, in_order, train_batches
from ditjax.errors import FaultError, UserError
from ditjax.files import faults

N, SEED = 11, 3
BAD = (2, 5, 6)


def images(folder, bad=()):
    """N images of one class: image i is 10 i in its left column and 10 i + 7 in its right one."""
    (folder / "a").mkdir(parents=True)
    for i in range(N):
        pixels = np.tile(10 * i + np.arange(8, dtype=np.uint8), (8, 1))
        Image.fromarray(pixels).save(folder / "a" / f"{i}.png")
    for i in bad:
        path = folder / "a" / f"{i}.png"
        path.write_bytes(path.read_bytes()[:40])
    return folder


def spec_of(folder, data_dir, **kwargs):
    return DataSpec(f"folder:{folder}", "train", 8, 1, flip=True, data_dir=data_dir, **kwargs)


def take(spec, steps, batch_size=4, **kwargs):
    with train_batches(spec, SEED, batch_size, **kwargs) as batches:
        return list(itertools.islice(batches, steps))


def joined(batches, key):
    return np.concatenate([batch[key] for batch in batches])


def skipping(order, bad):
    """Each bad record's place taken by the next in the order, cyclic, that is sound."""
    return [
        next(
            order[(i + k) % len(order)]
            for k in range(len(order))
            if order[(i + k) % len(order)] not in bad
        )
        for i in range(len(order))
    ]


@pytest.fixture
def broken(tmp_path):
    """(spec of a folder with three bad images, their record numbers)."""
    spec = spec_of(images(tmp_path / "images", BAD), tmp_path / "data", max_damaged=3)
    dataset_info(spec.name, "train", spec.data_dir, 3)
    source = prepare(spec.name, spec.data_dir).as_data_source("train", decoders=None)
    raw = [source.data_source[i] for i in range(N)]
    bad = {i for i, record in enumerate(raw) if any(b"%d.png" % k in record for k in BAD)}
    # '1.png' is no end of '11.png' here, but '10.png' holds '0.png': BAD has neither.
    assert len(bad) == 3
    return spec, bad


def test_the_next_of_the_epochs_order_takes_the_place(broken):
    spec, bad = broken
    told: list[str] = []
    batches = take(spec, 9, warn=told.append)
    expected = np.concatenate([skipping(epoch_order(SEED, e, N), bad) for e in range(4)])[:36]
    np.testing.assert_array_equal(joined(batches, "index"), expected)
    assert bad & set(np.concatenate([epoch_order(SEED, e, N) for e in range(3)]))
    # Each is told once, by number, file and reason.
    assert len(told) == 3
    for k in BAD:
        (line,) = [line for line in told if f"(a/{k}.png) is damaged (" in line]
        assert "skipped, as config.data.max_damaged=3 allows" in line
    # An element's flip stays that of its position.
    left = np.round((joined(batches, "image")[:, 0, 0, 0] + 1) * 127.5)
    assert not set(left // 10) & set(BAD)
    np.testing.assert_array_equal(left % 10 == 7, flips(SEED, 0, 36))


@pytest.mark.parametrize("cache_mb", [0, 256])
def test_neither_batches_nor_processes_nor_a_resume_change_it(broken, cache_mb):
    spec, _ = broken
    spec = DataSpec(**{**vars(spec), "cache_mb": cache_mb})
    silent = {"warn": lambda line: None}
    whole = take(spec, 12, **silent)
    for batch, part in zip(whole[5:], take(spec, 7, start_step=5, **silent), strict=True):
        np.testing.assert_array_equal(batch["image"], part["image"])
    for rows in ([0, 3], [1], [2]):
        for batch, part in zip(whole, take(spec, 12, rows=np.array(rows), **silent), strict=True):
            np.testing.assert_array_equal(batch["index"][rows], part["index"])
            np.testing.assert_array_equal(batch["image"][rows], part["image"])
    large = take(spec, 4, batch_size=12, **silent)
    np.testing.assert_array_equal(joined(whole, "index"), joined(large, "index"))


@pytest.mark.parametrize(
    ("allowed", "match"),
    [
        (0, r"is damaged \(.*prepare the data set again, or set config\.data"),
        (2, r"is damaged \(.*more than config\.data\.max_damaged=2 records are: delete"),
    ],
)
def test_past_the_cap_it_ends(broken, allowed, match):
    spec, _ = broken
    spec = DataSpec(**{**vars(spec), "max_damaged": allowed})
    told: list[str] = []
    with pytest.raises(UserError, match=match) as error:
        take(spec, 9, warn=told.append)
    assert "\n" not in str(error.value)
    assert len(told) == allowed


def test_a_set_without_a_sound_record(tmp_path):
    spec = spec_of(images(tmp_path / "i", range(N)), tmp_path / "d", max_damaged=N)
    with pytest.raises(UserError, match="every record of the data set is damaged"):
        take(spec, 9, warn=lambda line: None)


def test_a_folder_with_more_than_the_cap_is_not_converted(tmp_path):
    folder = images(tmp_path / "images", BAD)
    for allowed in (0, 2):
        with pytest.raises(UserError, match=r"a/\d\.png is not a sound image .*or set config"):
            dataset_info(f"folder:{folder}", "train", tmp_path / "data", allowed)
    assert dataset_info(f"folder:{folder}", "train", tmp_path / "data", 3).num_examples == N


def test_in_order_the_next_record_stands_for_it(broken):
    spec, bad = broken
    batches = list(in_order(spec, 4))
    assert [len(batch["label"]) for batch in batches] == [4, 4, 3]
    np.testing.assert_array_equal(joined(batches, "index"), skipping(list(range(N)), bad))
    with pytest.raises(UserError, match="is damaged"):
        list(in_order(DataSpec(**{**vars(spec), "max_damaged": 0}), 4))


def damage(path, where, count=10):
    content = bytearray(path.read_bytes())
    content[where : where + count] = bytes(b ^ 0x55 for b in content[where : where + count])
    path.write_bytes(content)


def test_a_record_that_array_record_cannot_read_leaves_the_others(digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path / "data")
    file = tmp_path / "data/digits/1.0.0/digits-test.array_record-00000-of-00001"
    damage(file, file.read_bytes().find(b"\x89PNG") + 40)  # of record 0, the first in the file
    for cache_mb in (0, 256):
        spec = DataSpec(
            "digits",
            "test",
            8,
            1,
            flip=False,
            data_dir=tmp_path / "data",
            cache_mb=cache_mb,
            max_damaged=1,
        )
        told: list[str] = []
        found = joined(take(spec, 12, batch_size=32, warn=told.append), "index")[:359]
        np.testing.assert_array_equal(found, skipping(epoch_order(SEED, 0, 359), {0}))
        assert len(told) == 1
        assert "'digits', split 'test': record 0 is damaged" in told[0]


def mean(i):
    """Of record i; noise, which no compression shortens."""
    return np.random.default_rng(i).standard_normal((2, 4, 4, 2)).astype(np.float32)


@pytest.fixture
def encoded(tmp_path):
    """Latents of 9 records, and their file."""
    writer = LatentWriter(tmp_path / "l", "train", (4, 4, 2), ("a",), 9, {"images": "x/1"})
    for shard in writer.missing():
        writer.write(
            shard,
            [
                {"mean": mean(i), "label": 0, "log_variance": np.zeros((2, 4, 4, 2), np.float32)}
                for i in shard
            ],
        )
    writer.finish()
    (file,) = (tmp_path / "l").rglob("*.array_record*")
    return tmp_path / "l", file


@pytest.mark.parametrize("cache_mb", [0, 256])
def test_latents(encoded, cache_mb):
    folder, file = encoded
    place = file.read_bytes().find(mean(4)[0].tobytes())
    assert place > 0
    damage(file, place)
    spec = DataSpec(
        f"latents:{folder}", "train", 8, 1, flip=False, cache_mb=cache_mb, max_damaged=1
    )
    told: list[str] = []
    batches = take(spec, 4, batch_size=5, warn=told.append)
    expected = np.concatenate([skipping(epoch_order(SEED, e, 9), {4}) for e in range(3)])[:20]
    np.testing.assert_array_equal(joined(batches, "index"), expected)
    np.testing.assert_array_equal(joined(batches, "mean"), [mean(i)[0] for i in expected])
    assert len(told) == 1
    assert "record 4 is damaged" in told[0]
    with pytest.raises(UserError, match=r"record 4 is damaged.*encode the data set again"):
        take(DataSpec(**{**vars(spec), "max_damaged": 0}), 4, batch_size=5)


def test_latents_are_counted_before_anything_is_compiled(encoded):
    folder, file = encoded
    assert dataset_info(f"latents:{folder}", "train").num_examples == 9
    file.write_bytes(file.read_bytes()[:-70_000])
    with pytest.raises(UserError, match="should hold 9 records and holds 0"):
        dataset_info(f"latents:{folder}", "train")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"splits": 3}'])
def test_latents_of_a_damaged_description(encoded, name, text):
    folder, file = encoded
    (file.parent / name).write_text(text)
    with pytest.raises(UserError, match="latents") as error:
        dataset_info(f"latents:{folder}", "train")
    assert "\n" not in str(error.value)


def test_what_is_told_stands_once_in_the_file(tmp_path, capsys):
    for _ in range(2):
        warn = stream.record_warnings(tmp_path / "damaged.txt")
        warn("record 1")
        warn("record 2")
    assert (tmp_path / "damaged.txt").read_text() == "record 1\nrecord 2\n"
    assert capsys.readouterr().err.count("warning: record 1\n") == 2


def test_an_image_too_long_to_be_scaled():
    with pytest.raises(UserError, match="1x9000 is too long to be scaled to 256"):
        crop.center_crop(Image.new("L", (1, 9000)), 256)
    assert crop.center_crop(Image.new("L", (4, 9000)), 4).size == (4, 4)


@pytest.mark.parametrize("latent", [False, True])
def test_a_fault_of_the_file_system_is_no_damaged_record(latent, broken, encoded, monkeypatch):
    """It is neither skipped, which would change what is learned, nor counted."""
    spec, _ = broken
    if latent:
        spec = DataSpec(f"latents:{encoded[0]}", "train", 8, 1, flip=False, cache_mb=0)
    expected = take(spec, 3)
    left = [0]
    real = _Source.read, _Source.read_many

    def fails(which):
        def read(self, index):
            if left[0]:
                left[0] -= 1
                raise RuntimeError("UNKNOWN: reading /data/shard: Stale file handle")
            return real[which](self, index)

        return read

    monkeypatch.setattr(faults, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(_Source, "read", fails(0))
    monkeypatch.setattr(_Source, "read_many", fails(1))
    left[0] = 2
    for a, b in zip(expected, take(spec, 3), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    told: list[str] = []
    left[0] = 10**6
    with pytest.raises(FaultError, match=r"record \d+: .*Stale file handle.*Nothing was changed"):
        take(spec, 3, warn=told.append)
    assert not told


def test_a_file_of_records_that_cannot_be_opened_now_is_not_empty(tmp_path, monkeypatch):
    def fails(paths):
        raise OSError(24, "Too many open files", paths[0])

    monkeypatch.setattr(faults, "WAITS", (0.0,))
    monkeypatch.setattr("grain.sources.ArrayRecordDataSource", fails)
    with pytest.raises(FaultError, match="Too many open files"):
        builders.count_records(tmp_path / "shard")
