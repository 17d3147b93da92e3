"""Round trips, crashes between writing and renaming, and damaged files of every kind."""

import errno
import json
import math
import os

import numpy as np
import pytest
from PIL import Image

from ditjax.errors import FaultError, UserError
from ditjax.files import atomic
from ditjax.runs import results
from tests.sample_files import save_samples


def a_result(**changes):
    protocol = {"features": "digits", "num": 1000, "eta": 0.0}
    result = {
        "schema": 1,
        "run": "DiT-4x96x3-p1-seed0",
        "model": {
            "name": "DiT-4x96x3/1",
            "size": "4x96x3",
            "depth": 4,
            "width": 96,
            "heads": 3,
            "patch": 1,
            "block": "adaln_zero",
            "tokens": 64,
        },
        "params": 669312,
        "gflops": 0.0317,
        "train": {
            "steps": 2000,
            "batch_size": 128,
            "images": 256000,
            "seconds": 41.3,
            "learning_rate": 1e-3,
            "final_loss": 0.17,
            "seed": 0,
        },
        "sample": {
            "num": 1000,
            "sampler": "ddim",
            "steps": 50,
            "eta": 0.0,
            "cfg_scale": 1.0,
            "cfg_channels": "all",
            "seed": 0,
            "seconds": 6.0,
        },
        "metrics": {"fd_digits": 4.2, "accuracy": 0.95},
        "protocol": protocol,
        "protocol_hash": atomic.protocol_hash(protocol),
        "environment": {"command": "python -m ditjax.sweep"},
        "config": {"seed": 0},
    }
    return result | changes


def test_round_trip(tmp_path):
    path = results.write_result(tmp_path / "new" / "run", a_result())
    assert path.name == "result.json"
    assert results.read_result(path) == a_result()
    assert results.read_result(path.parent) == a_result()


UNET = {"name": "U-Net-64", "channels": [64, 128, 256], "attention": {"heads": 4, "at": [16]}}


@pytest.mark.parametrize("model", [UNET, {"name": "MLP"}])
def test_a_network_describes_itself_as_it_likes(tmp_path, model):
    path = results.write_result(tmp_path, a_result(model=model))
    assert results.read_result(path) == a_result(model=model)


def test_nan_is_null_on_disk_and_nan_again(tmp_path):
    metrics = {"fd_digits": math.nan, "accuracy": np.float32(0.5)}
    path = results.write_result(tmp_path, a_result(metrics=metrics))
    assert json.loads(path.read_text())["metrics"] == {"fd_digits": None, "accuracy": 0.5}
    assert math.isnan(results.read_result(path)["metrics"]["fd_digits"])


def test_integers_are_numbers_and_keys_to_come_stay(tmp_path):
    path = results.write_result(tmp_path, a_result(gflops=2, later={"x": 1}))
    read = results.read_result(path)
    assert isinstance(read["gflops"], float)
    assert dict(read)["later"] == {"x": 1}


def test_training_gflops_count_the_passes_that_are_recorded(tmp_path):
    plain, more = a_result(), changed(a_result(), 4.5, "train", "passes")
    assert results.trained_gflops(plain, 100) == pytest.approx(300 * plain["gflops"])
    results.write_result(tmp_path, more)
    found = results.trained_gflops(results.read_result(tmp_path), 100)
    assert found == pytest.approx(450 * more["gflops"])


def test_protocol_hash_ignores_order_and_sees_every_value():
    one = atomic.protocol_hash({"a": 1, "b": 2.0})
    assert one == atomic.protocol_hash({"b": 2.0, "a": 1})
    assert one != atomic.protocol_hash({"a": 1, "b": 2.5})
    assert len(one) == 12


@pytest.mark.parametrize("crash_at", ["fsync", "replace"])
def test_a_crash_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, crash_at):
    path = atomic.write_atomic(tmp_path / "result.json", b"old")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, crash_at, crash)
    with pytest.raises(KeyboardInterrupt):
        atomic.write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_data_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen(name, call):
        def call_and_note(*arguments):
            order.append(name)
            return call(*arguments)

        return call_and_note

    monkeypatch.setattr(os, "fsync", seen("fsync", fsync))
    monkeypatch.setattr(os, "replace", seen("replace", replace))
    atomic.write_atomic(tmp_path / "file", b"data")
    assert order[:2] == ["fsync", "replace"]


def test_a_full_disk_is_a_fault_and_no_mistake(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FaultError, match=r"cannot write .*/a: No space left on device\. Free"):
        atomic.write_atomic(tmp_path / "a", b"1")
    assert not list(tmp_path.iterdir())


def test_others_may_read_what_is_written(tmp_path):
    old = os.umask(0o022)
    try:
        path = atomic.write_atomic(tmp_path / "file", b"data")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_folder_that_is_a_file_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        atomic.write_atomic(tmp_path / "file" / "result.json", b"")


def without(result, *keys):
    inner = result
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return result


def changed(result, value, *keys):
    inner = result
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return result


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (without(a_result(), "gflops"), "key 'gflops' is missing"),
        (without(a_result(), "train", "seed"), "key 'train.seed' is missing"),
        (without(a_result(), "model", "name"), "key 'model.name' is missing"),
        (changed(a_result(), 4, "model", "name"), "model.name is 4, expected a string"),
        (changed(a_result(), "DiT", "model"), "model is 'DiT', expected an object"),
        (changed(a_result(), "4", "train", "steps"), "train.steps is '4', expected an integer"),
        (changed(a_result(), True, "params"), "params is True, expected an integer"),
        (changed(a_result(), 1.5, "params"), "params is 1.5, expected an integer"),
        (changed(a_result(), [], "train"), r"train is \[\], expected an object"),
        (changed(a_result(), 7, "run"), "run is 7, expected a string"),
        (changed(a_result(), 0, "train", "passes"), "train.passes is 0, expected a number above 0"),
        (changed(a_result(), -1.0, "gflops"), "gflops is -1.0, expected a positive"),
        (changed(a_result(), math.nan, "gflops"), "gflops is nan, expected a positive"),
        (changed(a_result(), "x", "metrics", "fd_digits"), "metrics.fd_digits is 'x'"),
        (changed(a_result(), "no", "protocol_hash"), "protocol_hash is 'no', expected hex"),
        (changed(a_result(), 9, "schema"), "schema is 9"),
        ([1], "expected an object, not list"),
    ],
)
def test_a_wrong_result_names_file_and_key(tmp_path, value, words):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=words) as raised:
        results.read_result(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_key_proposes_the_nearest(tmp_path):
    path = tmp_path / "result.json"
    value = without(a_result(), "gflops") | {"gflop": 1.0}
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match="Did you mean 'gflop'"):
        results.read_result(path)


@pytest.mark.parametrize("data", [b"", b'{"schema": 1, "run', b"\xff\xfe\x00", b"[" * 100_000])
def test_a_half_written_result_names_the_file(tmp_path, data):
    path = tmp_path / "result.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"result\.json is not"):
        results.read_result(path)


def test_a_wrong_result_is_not_written(tmp_path):
    with pytest.raises(UserError, match=r"train.seed"):
        results.write_result(tmp_path, without(a_result(), "train", "seed"))
    assert not list(tmp_path.iterdir())


def test_find_results_names_every_problem_and_counts_a_folder_once(tmp_path):
    results.write_result(tmp_path / "a" / "good", a_result())
    (tmp_path / "a" / "good" / "checkpoints").mkdir()
    (tmp_path / "a" / "good" / "checkpoints" / "result.json").write_text("not looked at")
    for name in ("half", "unfinished"):
        (tmp_path / "a" / name).mkdir()
    (tmp_path / "a" / "half" / "result.json").write_text('{"schema"')
    (tmp_path / "a" / "unfinished" / "metrics.jsonl").write_text('{"step": 1}\n')
    found, problems = results.find_results([tmp_path, tmp_path / "a"])
    assert [each.folder.name for each in found] == ["good"]
    half = [problem for problem in problems if "half" in problem]
    unfinished = [problem for problem in problems if "did not finish" in problem]
    assert "not whole JSON" in half[0]
    assert len(unfinished) == 1
    with pytest.raises(UserError, match="nowhere"):
        results.find_results([tmp_path / "nowhere"])


def test_a_run_within_a_run_is_found(tmp_path):
    outer = tmp_path / "outer"
    for folder in (outer, outer / "tuned", outer / "more" / "inner"):
        results.write_result(folder, a_result())
    (outer / "halted").mkdir()
    (outer / "halted" / "metrics.jsonl").write_text('{"step": 1}\n')
    results.write_result(outer / "halted" / "finished", a_result())
    for own in ("checkpoints", "averages", "metrics"):
        results.write_result(outer / own / "x", a_result())
    found, problems = results.find_results([tmp_path])
    assert sorted(str(each.folder.relative_to(tmp_path)) for each in found) == [
        "outer",
        "outer/halted/finished",
        "outer/more/inner",
        "outer/tuned",
    ]
    (problem,) = problems
    assert "halted has no result.json" in problem


def test_a_torn_last_line_is_dropped_and_a_step_logged_twice_holds_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 2.0}', '{"step": 2, "loss": 1.5}']
    path.write_text("\n".join(lines) + '\n{"step": 3, "lo')
    assert results.read_metrics(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.5}]


@pytest.mark.parametrize("damage", ['{"step": 2, "lo', '{"loss": 1.0}', '{"step": "2"}', "[]"])
def test_a_damaged_line_before_the_last_is_named(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + damage + '\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is damaged"):
        results.read_metrics(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_each_image_where_it_belongs(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 200, (5, 2, 3, channels), np.uint8)
    path = results.save_grid(images, tmp_path / "grid.png", 3, upscale=4, gap=1)
    with Image.open(path) as image:
        assert image.mode == ("L" if channels == 1 else "RGB")
        pixels = np.asarray(image).reshape(image.height, image.width, channels)
    assert pixels.shape == ((2 * 2 + 1) * 4, (3 * 3 + 2) * 4, channels)
    small = pixels[::4, ::4]
    np.testing.assert_array_equal(pixels, small.repeat(4, 0).repeat(4, 1))
    for n, (top, left) in enumerate([(0, 0), (0, 4), (0, 8), (3, 0), (3, 4)]):
        np.testing.assert_array_equal(small[top : top + 2, left : left + 3], images[n])
    assert np.all(small[3:, 8:] == 255)
    assert np.all(small[2] == 255)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 4, 4, 1), np.float32),
        np.zeros((2, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 2), "u1"),
    ],
)
def test_images_of_another_kind_are_refused(tmp_path, images):
    with pytest.raises(UserError, match=r"expected u8\[N,H,W,C\]"):
        results.save_grid(images, tmp_path / "file", 1)


def test_samples_round_trip_and_are_read_by_numpy(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), np.uint8)
    label = np.arange(7)
    path = save_samples(tmp_path / "samples.npz", images, label)
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], images)
        assert arrays["label"].dtype == np.int32
    back, labels = results.load_samples(path)
    np.testing.assert_array_equal(back, images)
    np.testing.assert_array_equal(labels, label)
    first, labels = results.load_samples(path, limit=3)
    np.testing.assert_array_equal(first, images[:3])
    np.testing.assert_array_equal(labels, label[:3])
    assert results.load_samples(save_samples(path, images))[1] is None


def test_damaged_samples_name_the_file(tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, images=np.zeros((2, 4, 4, 1), np.uint8))
    with pytest.raises(UserError, match=r"samples.npz has no array 'arr_0'"):
        results.load_samples(path)
    np.savez(path, arr_0=np.zeros((2, 4, 4, 1)))
    with pytest.raises(UserError, match=r"float64\[2, 4, 4, 1\]"):
        results.load_samples(path)
    np.savez(path, arr_0=np.array([{"a": 1}]))
    with pytest.raises(UserError, match="not a whole npz"):
        results.load_samples(path)
    np.savez_compressed(
        path, arr_0=np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8)
    )
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(UserError, match=r"samples\.npz is not a whole npz"):
        results.load_samples(path)
    path.write_bytes(whole[:100] + b"\x00" * 50 + whole[150:])
    with pytest.raises(UserError, match=r"samples\.npz is not a whole npz"):
        results.load_samples(path)
    with pytest.raises(UserError, match="cannot read"):
        results.load_samples(tmp_path / "none.npz")


@pytest.mark.parametrize("value", [10**400, "9" * 5000])
def test_numbers_beyond_64_bits_are_refused(tmp_path, value):
    for key in ("params", "gflops"):
        (tmp_path / "result.json").write_text(json.dumps(a_result(**{key: value})))
        with pytest.raises(UserError, match=f"{key} is .*, expected a"):
            results.read_result(tmp_path)


def test_a_log_whose_line_nests_too_deep_is_named(tmp_path):
    deep = "[" * 50_000 + "]" * 50_000
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "x": {deep}}}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        results.read_metrics(tmp_path / "metrics.jsonl")
