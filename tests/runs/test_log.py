"""Logs that a resume can trust, and a line of progress that says what is left."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ditjax.errors import FaultError
from ditjax.runs import log as log_module
from ditjax.runs.log import MetricsLog, Progress, last_metrics, newest_metrics

ROOT = Path(__file__).parents[2]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    with MetricsLog(tmp_path, 0) as first:
        assert first.last == {}
        for step in (10, 20, 30):
            first.scalars(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "los')
    with MetricsLog(tmp_path, 20) as second:
        assert second.last == {"step": 20, "loss": 0.05}
        second.scalars(30, {"loss": 0.5})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 0.1), (20, 0.05), (30, 0.5)]


def test_what_a_checkpoint_waits_for_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut after it takes no line up to it."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    with MetricsLog(tmp_path, 0) as log:
        log.scalars(10, {"loss": 0.1})
        assert synced == []
        log.sync()
        assert synced == [(tmp_path / "metrics.jsonl").stat().st_ino]
    synced.clear()
    with MetricsLog(tmp_path / "another", 0, write=False) as log:
        log.sync()
    assert synced == []


def test_a_resume_goes_on_from_the_newest_value_of_each_name(tmp_path):
    with MetricsLog(tmp_path, 0) as first:
        first.scalars(10, {"loss": 0.3, "eval/seconds": 4.0})
        first.scalars(20, {"loss": 0.2})
        first.scalars(30, {"loss": 0.1, "eval/seconds": 9.0})
    with MetricsLog(tmp_path, 20) as second:
        assert second.last == {"step": 20, "loss": 0.2, "eval/seconds": 4.0}


def test_words_are_in_the_lines_alone(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.scalars(10, {"number": 0.25, "word": "abcdef", "list": [{"step": 9}]})
    assert last_metrics(tmp_path) == {
        "step": 10,
        "number": 0.25,
        "word": "abcdef",
        "list": [{"step": 9}],
    }
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"number" in events.read_bytes()
    assert b"word" not in events.read_bytes()


def test_a_torn_line_in_the_middle_ends_what_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with MetricsLog(tmp_path, 5) as resumed:
        assert resumed.last == {"step": 1}
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_the_newest_lines_of_a_long_log(tmp_path):
    rows = [{"step": step, "word": "x" * 90} for step in range(2000)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    assert len(text) > 2 * log_module._TAIL
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 20')
    assert newest_metrics(tmp_path, 3) == rows[-3:]
    assert last_metrics(tmp_path) == rows[-1]
    assert 500 < len(newest_metrics(tmp_path, 5000)) < 2000
    assert newest_metrics(tmp_path / "none", 3) == []


def test_last_metrics_skips_a_torn_line(tmp_path):
    assert last_metrics(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 2.0}\n{"step": 8, "lo')
    assert last_metrics(tmp_path) == {"step": 7, "loss": 2.0}
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 7, "loss": 2.0}\n[1]\n\xff\xfe\x00\x00')
    assert last_metrics(tmp_path) == {"step": 7, "loss": 2.0}


def test_events_hold_the_scalars(tmp_path):
    with MetricsLog(tmp_path, 0) as first:
        first.scalars(10, {"loss": 0.25})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()


def test_no_pytorch_is_imported_where_there_is_one(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('a broken one')")
    program = "import ditjax.runs.log, sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
    )
    assert done.stdout.split() == ["False"]


class Full:
    """A file on a disk that takes no more."""

    closed = False

    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        self.write("")

    close = flush


def test_a_full_disk_is_told_in_one_line(tmp_path):
    with pytest.raises(FaultError) as told, MetricsLog(tmp_path, 0) as log:  # noqa: PT012
        log.scalars(1, {"loss": 1.0})
        log._lines.close()
        vars(log._lines)["file"] = Full()
        log.scalars(2, {"loss": 1.0})
    assert str(told.value) == (
        f"cannot write {tmp_path / 'metrics.jsonl'}: No space left on device. Free some space, then"
        " run the same command again to resume."
    )


def test_events_that_cannot_be_written_are_told_in_one_line(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        writer = vars(log._events.file)
        whole, writer["_py_recordio_writer"] = writer["_py_recordio_writer"], Full()
        with pytest.raises(FaultError, match="No space left on device"):
            log.scalars(1, {"loss": 1.0})
        writer["_py_recordio_writer"] = whole


def test_tensorboard_sees_them_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("ditjax.runs.log.SYNC_SECONDS", 0.0)
    with MetricsLog(tmp_path, 0) as log:
        log.scalars(1, {"loss": 1.0})
        log.image(1, "grid", np.zeros((4, 6, 3), np.uint8))
        (events,) = tmp_path.glob("events.out.tfevents.*")
        assert b"loss" in (seen := events.read_bytes())
        assert b"PNG" in seen


def test_progress_tells_rate_and_time_left(monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 40.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    out = io.StringIO()
    progress = Progress("train", 100, every_seconds=0.0, out=out)
    progress.report(10, loss=0.5)  # with the compilation: 1 a second
    progress.report(50, loss=0.25)  # 40 in 10 s
    progress.report(100)
    lines = out.getvalue().splitlines()
    assert lines[1] == "train 50/100 steps · 50% · 4/s · 0:12 left · loss 0.25"
    assert lines[2].startswith("train 100/100 steps · 100% · 3/s · done")


def test_what_is_said_stands_on_a_line_of_its_own():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for out, expected in ((io.StringIO(), "a\nb\n"), (Terminal(), "\r\x1b[2Ka\n\r\x1b[2Kb\n")):
        progress = Progress("train", 10, out=out)
        progress.print_line("a")
        progress.print_line("b")
        assert out.getvalue() == expected


def test_progress_in_a_file_is_sparse(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out = io.StringIO()
    progress = Progress("train", 1000, every_seconds=10.0, out=out)
    for step in range(1, 1001):
        now[0] = step * 0.1
        progress.report(step)
    assert 9 <= len(out.getvalue().splitlines()) <= 11
