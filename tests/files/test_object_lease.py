"""Leases on a store: one holder, followed when it is silent, by writes that nobody else made."""

import errno
import json
import threading

import pytest

from ditjax.errors import UserError
from ditjax.files import lease
from ditjax.files.lease import Holder, ObjectLease
from ditjax.files.store import ObjectPath
from tests.memory_store import memory  # noqa: F401 (a fixture)

FILE = ObjectPath("gs://bucket/run/.lease")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(lease, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(lease, "end_process", lambda line: None)


def left_by(turn=0, **changes):
    """The lease of another process, on another machine unless told."""
    holder = Holder("there", "elsewhere", 7, "1", "1970-01-01", "their token")._replace(**changes)
    FILE.write_text(json.dumps({**holder._asdict(), "turn": f"{turn:012}"}))


def test_one_of_many_holds_it_and_the_next_follows(memory):  # noqa: F811
    held: list[ObjectLease] = []
    refused: list[str] = []

    def start():
        try:
            held.append(ObjectLease(FILE, "the run"))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    assert len(refused) == 7
    assert all("the run is in use by process" in line for line in refused)
    held[0].release()
    assert lease.holders([FILE], 0.0) == {}
    assert memory.objects, "a lease is never removed: stores ignore the condition"
    ObjectLease(FILE, "the run").release()


def test_a_silent_holder_is_followed_and_a_living_one_is_not(memory):  # noqa: F811
    left_by()
    first = ObjectLease(FILE, "the run")
    assert first._is_mine(lease._read(FILE))
    first.release()
    left_by()
    turns = iter(range(1, 1000))

    def lives(call):
        if call.startswith("head"):
            left_by(next(turns))

    memory.fault = lives
    with pytest.raises(UserError, match="in use by process 7 on there"):
        ObjectLease(FILE, "the run")


def test_a_holder_that_slept_is_told_and_writes_no_more(memory):  # noqa: F811
    lines: list[str] = []
    held = ObjectLease(FILE, "the run", lost=lines.append)
    left_by()
    held._move()
    assert json.loads(FILE.read_text())["token"] == "their token"
    held.check()
    assert len(lines) == 1
    assert "its place was taken by process 7 on there" in lines[0]
    held.release()
    assert json.loads(FILE.read_text())["token"] == "their token"


def test_a_taker_that_comes_second_finds_another_version(memory):  # noqa: F811
    """Both have judged the holder to be gone; only one may write over it."""
    left_by()
    taker = ObjectLease.__new__(ObjectLease)
    taker.file = FILE
    judged = FILE.read_bytes()

    def meanwhile(call):
        if call.startswith("put"):
            memory.fault = lambda call: None
            left_by(token="another")

    memory.fault = meanwhile
    taker._take_away(lambda now: now == judged)
    assert json.loads(FILE.read_text())["token"] == "another"


def test_a_write_whose_answer_was_lost_counts(memory):  # noqa: F811
    real = memory.put

    def lost(where, data, unless):
        real(where, data, unless)
        memory.put = real
        return False  # as the second try of the client, which meets the first one's version

    memory.put = lost
    held = ObjectLease(FILE, "the run")
    held.check()
    held.release()


def test_a_lease_is_chosen_by_its_place(memory):  # noqa: F811
    with lease.scope():
        lease.acquire("gs://bucket/run/.lease", "the run")
        lease.check_held()
        assert list(lease.holders([FILE], 0.0)) == [FILE]
    assert lease._read(FILE) is None


def test_no_bucket_and_no_rights_are_one_line(memory):  # noqa: F811
    with pytest.raises(UserError, match="there is no bucket 'other'"):
        ObjectLease("gs://other/run/.lease", "the run")
    with pytest.raises(UserError, match="the store refuses it"):
        ObjectLease("gs://closed/run/.lease", "the run")


def test_a_store_that_does_not_answer_takes_nothing_away(memory):  # noqa: F811
    lines: list[str] = []
    held = ObjectLease(FILE, "the run", lost=lines.append)

    def silent(call):
        raise TimeoutError(errno.ETIMEDOUT, "no answer")

    memory.fault = silent
    held.check()
    memory.fault = lambda call: None
    held.check()
    assert lines == []
    held.release()
    assert FILE.read_bytes().startswith(b"released ")
