"""Samples to disk: one npz however they came, and after a kill none is lost or twice."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ditjax.data.images import open_images
from ditjax.errors import FaultError, UserError
from ditjax.runs.results import load_samples
from ditjax.sampling.samples import SampleWriter
from tests.unstable import FOR_EVER, Unstable

RECORD = {"seed": 0, "sampler": "ddpm", "weights": "0123"}


def sample(start, stop, shape=(4, 3, 3)):
    """Sample i depends on i alone."""
    images = [
        np.random.default_rng(i).integers(256, size=shape, dtype=np.uint8)
        for i in range(start, stop)
    ]
    return np.stack(images), np.arange(start, stop) % 10


def writer(path, count=23, record=RECORD, shape=(4, 3, 3), labelled=True):
    return SampleWriter(path, count, shape, record, labelled=labelled)


def fill(to, size, limit=None):
    """Draws and writes what is missing, or the first `limit` batches of it."""
    for done, (start, stop) in enumerate(to.missing(size)):
        if done == limit:
            return
        to.write(start, *sample(start, stop))


def check(path, count=23):
    images, label = load_samples(path)
    expected, labels = sample(0, count)
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(label, labels)
    assert sorted(os.listdir(path.parent)) == [path.name]


def test_all_at_once(tmp_path):
    to = writer(tmp_path / "a.npz")
    assert list(to.missing(10)) == [(0, 10), (10, 20), (20, 23)]
    fill(to, 10)
    assert to.finish() == tmp_path / "a.npz"
    check(tmp_path / "a.npz")
    # As ADM's evaluator and numpy read it.
    with np.load(tmp_path / "a.npz") as file:
        assert set(file) == {"arr_0", "label", "provenance"}
        np.testing.assert_array_equal(file["arr_0"], sample(0, 23)[0])
    assert open_images(tmp_path / "a.npz").count == 23


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_resumed_with_another_batch_size(tmp_path, limit):
    fill(writer(tmp_path / "a.npz"), 10, limit)
    again = writer(tmp_path / "a.npz")
    starts = [start for start, _ in again.missing(4)]
    assert starts == list(range(10 * limit, 23, 4))
    fill(again, 4)
    again.finish()
    check(tmp_path / "a.npz")


def test_ranges_in_any_order_and_from_two_processes(tmp_path):
    one, two = writer(tmp_path / "a.npz"), writer(tmp_path / "a.npz")
    two.write(15, *sample(15, 23))
    one.write(5, *sample(5, 9))
    assert list(one.missing(6)) == [(0, 5), (9, 15)]
    with pytest.raises(UserError, match="samples 0 to 5 of 23 are missing"):
        two.finish()
    # Overlapping the other's: nothing comes twice, and what then lacks is asked for.
    one.write(0, *sample(0, 6))
    assert list(two.missing(6)) == [(6, 12), (12, 15)]
    fill(two, 6)
    one.finish()
    check(tmp_path / "a.npz")


def test_finished_is_finished(tmp_path):
    to = writer(tmp_path / "a.npz")
    fill(to, 10)
    to.finish()
    before = (tmp_path / "a.npz").stat()
    again = writer(tmp_path / "a.npz")
    assert again.finished
    assert list(again.missing(10)) == []
    again.finish()
    assert (tmp_path / "a.npz").stat().st_mtime_ns == before.st_mtime_ns
    check(tmp_path / "a.npz")


def test_killed_between_the_file_and_the_removal_of_its_parts(tmp_path, monkeypatch):
    to = writer(tmp_path / "a.npz")
    fill(to, 10)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        to.finish()
    assert (tmp_path / "a.npz.parts").exists()
    again = writer(tmp_path / "a.npz")
    assert list(again.missing(5)) == []
    again.finish()
    check(tmp_path / "a.npz")


def test_a_part_that_a_disk_has_torn_is_made_again(tmp_path):
    shape = (40, 40, 3)
    to = writer(tmp_path / "a.npz", 3, shape=shape)
    for i in range(3):
        to.write(i, *sample(i, i + 1, shape))
    part = tmp_path / "a.npz.parts" / "000000001-000000002.npz"
    whole = part.read_bytes()
    part.write_bytes(whole[:-30])
    assert list(to.missing(100)) == [(1, 2)]
    # Same length, other bytes: found when they are read.
    damaged = bytearray(whole)
    damaged[-1000] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(UserError, match=r"000000001-000000002\.npz .*Remove that part"):
        to.finish()
    assert not (tmp_path / "a.npz").exists()
    part.unlink()
    to.write(1, *sample(1, 2, shape))
    to.finish()
    np.testing.assert_array_equal(load_samples(tmp_path / "a.npz")[0], sample(0, 3, shape)[0])


def test_a_write_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    to = writer(tmp_path / "a.npz")

    def half(file, **_):
        file.write(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("numpy.savez", half)
        with pytest.raises(KeyboardInterrupt):
            to.write(0, *sample(0, 4))
    assert os.listdir(tmp_path / "a.npz.parts") == ["record.json"]


def test_without_labels_and_in_grey(tmp_path):
    to = writer(tmp_path / "a.npz", 5, shape=(2, 2, 1), labelled=False)
    to.write(0, sample(0, 5, (2, 2, 1))[0])
    to.finish()
    images, label = load_samples(tmp_path / "a.npz")
    np.testing.assert_array_equal(images, sample(0, 5, (2, 2, 1))[0])
    assert label is None


@pytest.mark.parametrize(
    "change",
    [
        {"record": RECORD | {"seed": 1}},
        {"record": {}},
        {"count": 24},
        {"shape": (4, 3, 1)},
        {"labelled": False},
    ],
)
def test_other_samples_are_not_gone_on_with(tmp_path, change):
    to = writer(tmp_path / "a.npz")
    fill(to, 10, 1)
    with pytest.raises(UserError, match=r"a\.npz\.parts holds part of other samples"):
        writer(tmp_path / "a.npz", **change)
    fill(to, 10)
    to.finish()
    with pytest.raises(UserError, match=r"a\.npz holds other samples"):
        writer(tmp_path / "a.npz", **change)
    check(tmp_path / "a.npz")


def test_a_file_that_is_not_ours_is_not_written_over(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=sample(0, 23)[0], label=sample(0, 23)[1])
    with pytest.raises(UserError, match="holds other samples"):
        writer(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_text("mine")
    with pytest.raises(UserError, match="not a whole npz"):
        writer(tmp_path / "a.npz")


def test_mistakes(tmp_path):
    to = writer(tmp_path / "a.npz")
    images, label = sample(0, 4)
    for call, message in (
        (
            lambda: to.write(0, images.astype(np.float32), label),
            r"samples are float32\[4, 4, 3, 3\]",
        ),
        (lambda: to.write(0, images[:, :3], label), r"expected u8\[B,4,3,3\]"),
        (lambda: to.write(0, images[:0], label[:0]), r"uint8\[0, 4, 3, 3\]"),
        (lambda: to.write(20, images, label), "samples 20 to 24: expected a range of 23"),
        (lambda: to.write(-1, images, label), "samples -1 to 3"),
        (lambda: to.write(0, images), "every batch of a labelled set"),
        (lambda: to.write(0, images, label[:3]), "for 4 images: expected one integer"),
        (lambda: to.write(0, images, label * 0.5), "labels float64"),
        (lambda: next(to.missing(0)), "batches of 0"),
        (lambda: writer(tmp_path / "b.npz", 0), "0 samples"),
        (lambda: writer(tmp_path / "b.npz", shape=(4, 3, 4)), r"samples of \[4, 3, 4\]"),
        (lambda: writer(tmp_path / "b.npz", record={"x": print}), "plain JSON"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert list(to.missing(50)) == [(0, 23)]


RUN = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from tests.sampling.test_samples import sample, writer
for _ in sys.stdin:  # a run for each line, without its imports
    if pid := os.fork():
        os.waitpid(pid, 0)
        print("ended", flush=True)
        continue
    print(os.getpid(), flush=True)
    to = writer(sys.argv[1], 400)
    for start, stop in to.missing(7):
        to.write(start, *sample(start, stop))
        print(stop, flush=True)
        time.sleep(0.003)
    to.finish()
    print("done", flush=True)
    os._exit(0)
"""


def test_killed_again_and_again(tmp_path):
    """SIGKILL at any moment: each run goes on, and the file is what one run would have made."""
    from pathlib import Path

    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-c", RUN, str(tmp_path / "a.npz"), str(root)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root) as process:
        commands, answers = process.stdin, process.stdout
        assert commands is not None
        assert answers is not None

        def start() -> int:
            commands.write("\n")
            commands.flush()
            return int(line())

        def line() -> str:
            text = answers.readline()
            assert text, "it died"
            return text.strip()

        seen: list[str] = []
        for kill in range(4):
            pid = start()
            lines = [line() for _ in range(8)]
            time.sleep(0.002 * kill)
            os.kill(pid, signal.SIGKILL)
            rest = list(iter(line, "ended"))
            assert "done" not in lines + rest
            assert not set(lines) & set(seen)
            assert not (tmp_path / "a.npz").exists()
            seen += lines
        start()
        last = list(iter(line, "ended"))
        commands.close()
    assert last[-1] == "done"
    assert not set(last) & set(seen)
    check(tmp_path / "a.npz", 400)


@pytest.mark.parametrize("finished", [False, True])
def test_a_model_is_known_by_its_weights_not_by_its_place(tmp_path, finished):
    """A run whose directory is moved or spelled otherwise keeps what was drawn."""

    def writer(run, sha256="ab"):
        model = {"run": run, "step": 1, "params_sha256": sha256}
        path, shape = tmp_path / "x.npz", (4, 4, 3)
        return SampleWriter(path, 2, shape, {"model": model}, labelled=False, replace=True)

    first = writer("runs/one")
    first.write(0, np.zeros((2 if finished else 1, 4, 4, 3), np.uint8))
    if finished:
        first.finish()
    for run in ("./runs/one/", "/moved/one"):
        assert list(writer(run).missing(2)) == ([] if finished else [(1, 2)])
    assert list(writer("runs/one", "cd").missing(2)) == [(0, 2)]


@pytest.mark.parametrize("finished", [False, True])
def test_samples_that_cannot_be_read_now_are_neither_drawn_again_nor_replaced(
    finished, tmp_path, monkeypatch
):
    to = writer(tmp_path / "a.npz")
    fill(to, 10)
    if finished:
        to.finish()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    system = Unstable(monkeypatch, "npz", FOR_EVER)
    with pytest.raises(FaultError, match="Stale file handle"):
        list(SampleWriter(to.path, 23, to.shape, RECORD, labelled=True, replace=True).missing(10))
    system.left = 0
    assert {path: path.read_bytes() for path in before} == before
    system.left = 2
    assert list(writer(tmp_path / "a.npz").missing(10)) == []
