"""A run on a store: which checkpoints count, and a log in parts."""

import errno
import json
from pathlib import Path

import pytest

from ditjax.errors import FaultError, UserError
from ditjax.files import store
from ditjax.files.store import place
from ditjax.runs import log
from ditjax.runs.checkpoint import Checkpoints
from ditjax.runs.log import MetricsLog, last_metrics, newest_metrics
from ditjax.runs.results import find_results, read_metrics
from ditjax.runs.rundir import has_begun
from ditjax.runs.steps import Objects, steps_in
from tests.memory_store import memory  # noqa: F401 (a fixture)

RUN = place("gs://bucket/run")
MARKER = "commit_success.txt"


def step_of(number, *names):
    for name in names:
        (RUN / "checkpoints" / str(number) / name).write_bytes(b"x")


def test_a_step_counts_only_with_its_marker_which_goes_first(memory):  # noqa: F811
    steps = steps_in(RUN / "checkpoints")
    assert isinstance(steps, Objects)
    step_of(4, "state/d/0", "state/" + MARKER, MARKER)
    step_of(8, "state/d/0", "state/" + MARKER)  # killed while it was written
    step_of(12, "state/d/0", MARKER)
    assert steps.numbers() == [4, 12]
    assert (steps.is_whole(8), steps.is_whole(12)) == (False, True)
    memory.calls.clear()
    rest = steps.remove(4)
    assert steps.numbers() == [12]
    rest()
    removed = [call for call in memory.calls if call.startswith("delete")]
    assert removed[0] == f"delete run/checkpoints/4/{MARKER}"
    assert len(removed) == 3
    assert "It counts no more" in (steps.set_aside(12, "state is not what was saved") or "")
    assert steps.set_aside(12, "again") is None
    assert (steps.numbers(), steps.damaged()) == ([], ["12"])
    steps.tidy()  # what is torn goes, what was set aside stays to be looked at
    assert {name.split("/")[2] for name in memory.objects} == {"12"}


@pytest.fixture
def _no_thread(monkeypatch):
    monkeypatch.setattr(store, "SHIP_SECONDS", 3600.0)


@pytest.mark.usefixtures("_no_thread")
def test_a_log_is_written_in_parts_and_joined_at_its_end(memory, monkeypatch):  # noqa: F811
    monkeypatch.setattr(log, "PART_BYTES", 30)
    with MetricsLog(RUN, 0) as written:
        for step in range(1, 5):
            written.scalars(step, {"loss": step / 2})
            written.sync()
        parts = [path.name for path in (RUN / "metrics").iterdir()]
        assert parts == ["000000000001.jsonl", "000000000003.jsonl"]
        events = [name for name in memory.objects if "tfevents" in name]
        assert len(events) == 2
        # Readers see what was sent.
        assert [line["step"] for line in read_metrics(RUN / "metrics.jsonl")] == [1, 2, 3, 4]
        assert last_metrics(RUN) == {"step": 4, "loss": 2.0}
        assert [line["step"] for line in newest_metrics(RUN, 3)] == [2, 3, 4]
        assert "run did not finish" in find_results([RUN])[1][0]
    assert not (RUN / "metrics").exists()
    lines = (RUN / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.usefixtures("_no_thread")
def test_a_resumed_run_keeps_the_lines_up_to_its_step(memory):  # noqa: F811
    MetricsLog(RUN, 0)  # of a process that is killed
    (RUN / "metrics" / "000000000001.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 7}\n')
    (RUN / "metrics" / "000000000003.jsonl").write_text('{"step": 3}\n{"ste')
    resumed = MetricsLog(RUN, 2)
    assert resumed.last == {"step": 2, "loss": 7}
    assert not (RUN / "metrics").exists()
    # Killed while parts were joined: what is there twice is kept once.
    (RUN / "metrics" / "000000000001.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 7}\n')
    MetricsLog(RUN, 2)
    assert (RUN / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2, "loss": 7}\n'


@pytest.mark.usefixtures("_no_thread")
def test_a_store_that_does_not_answer_ends_the_run_in_one_line(memory):  # noqa: F811
    written = MetricsLog(RUN, 0)
    written.scalars(1, {"loss": 1.0})

    def silent(call):
        raise TimeoutError(errno.ETIMEDOUT, "the store does not answer")

    memory.fault = silent
    with pytest.raises(FaultError, match=r"the store does not answer\. Run the same command again"):
        written.sync()


def test_a_run_on_a_store_that_orbax_lacks_is_refused():
    with pytest.raises(UserError, match=r"s3://bucket/run/checkpoints: .* give another --workdir"):
        Checkpoints("s3://bucket/run/checkpoints", keep=1)
    assert not Path("s3:").exists()


def test_a_run_has_begun_with_its_first_checkpoint_or_log(memory):  # noqa: F811
    assert not has_begun(RUN)
    (RUN / "config.json").write_text("{}")
    (RUN / ".lease").write_text("released 1")
    assert not has_begun(RUN)
    step_of(4, "state/d/0")
    assert has_begun(RUN)
