"""One owner: who is refused, who follows a dead one, and that two never have it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ditjax.errors import UserError
from ditjax.files import lease
from ditjax.files.lease import Holder, Lease

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(lease, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(lease, "end_process", lambda line: None)  # a test that fails ends by itself


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run" / ".lease"


def said(file):
    return json.loads(file.read_text())


def left_by(file, **changes):
    """The lease of another process: by itself, of one on this machine that has ended."""
    holder = Holder("here", lease._machine(), 2**22 - 3, "1", "1970-01-01", "their token")
    holder = holder._replace(**changes)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**holder._asdict(), "turn": "000000000000"}) + "\n")
    return file.read_bytes()


def test_the_second_is_refused_with_the_holders_name(file):
    first = Lease(file, "the run")
    before = said(file)
    with pytest.raises(UserError, match=r"the run is in use by process") as raised:
        Lease(file, "the run")
    for word in (before["host"], str(os.getpid()), before["since"], str(file)):
        assert word in str(raised.value)
    assert said(file)["token"] == before["token"]
    first.release()
    assert list(file.parent.parent.iterdir()) == [], "a directory made for the lease alone stays"
    Lease(file, "the run").release()


def test_who_has_it_is_seen_without_having_it(file, tmp_path):
    none, torn, gone, far = (tmp_path / name for name in ("none", "torn", "gone", "far"))
    torn.write_text("{")
    left_by(gone)
    left_by(far, machine="elsewhere")
    first = Lease(file, "the run")
    before = {path: path.read_bytes() for path in (torn, gone, far, file)}
    files = [none, torn, gone, far, file]
    found = lease.holders(files, 0.0)
    assert list(found) == [far, file]
    assert (found[file].pid, found[far].token) == (os.getpid(), "their token")
    assert list(lease.holders(files, 0.05)) == [file]  # it did not move
    assert {path: path.read_bytes() for path in before} == before
    first.release()


def test_what_others_wrote_meanwhile_stays(file):
    held = Lease(file, "the run")
    (file.parent / "config.json").write_text("{}")
    held.release()
    assert os.listdir(file.parent) == ["config.json"]


def test_a_process_has_it_until_the_scope_ends(file):
    def work(error=None):
        with lease.scope():
            lease.acquire(file, "the run")
            token = said(file)["token"]
            with lease.scope():
                lease.acquire(file.parent / "." / ".lease", "the run")  # again: it has it already
            assert said(file)["token"] == token
            if error:
                raise error

    work()
    assert not file.exists()
    with pytest.raises(KeyboardInterrupt):
        work(KeyboardInterrupt())
    assert not file.exists()


def test_a_holder_that_was_killed_is_followed_at_once(file, monkeypatch):
    monkeypatch.setattr(lease, "SILENCE_SECONDS", 60.0)
    with subprocess.Popen(["sleep", "60"]) as process:
        left_by(file, pid=process.pid, began=lease._began(process.pid))
        with pytest.raises(UserError, match=f"process {process.pid} on here, since 1970"):
            Lease(file, "the run")
        process.kill()
        while lease._began(process.pid) is not None:  # until it is a zombie, still in the table
            time.sleep(0.01)
        Lease(file, "the run").release()
    left_by(file)
    Lease(file, "the run").release()


def test_another_process_of_the_same_number_is_no_holder(file):
    left_by(file, pid=os.getpid(), began="1")
    Lease(file, "the run").release()


@pytest.mark.parametrize("when", [0, 2**33])  # clocks of other machines say anything
def test_a_silent_holder_elsewhere_is_followed_after_the_bound(file, when, capsys):
    left_by(file, machine="elsewhere", pid=os.getpid())
    os.utime(file, (when, when))
    began = time.monotonic()
    Lease(file, "the run").release()
    assert time.monotonic() - began >= 0.3
    assert capsys.readouterr().err == (
        f"waiting for the end of process {os.getpid()} on here, since 1970-01-01, which uses the"
        " run, or for 0.3 s without a sign of it\n"
    )


@pytest.mark.parametrize("torn", [b"", b'{"host": "a", "pi', b"[1]", b'{"pid": -1}', b"\xff\0"])
def test_a_torn_lease_is_of_somebody_until_the_bound(file, torn):
    file.parent.mkdir()
    file.write_bytes(torn)
    began = time.monotonic()
    Lease(file, "the run").release()
    assert time.monotonic() - began >= 0.3


def test_a_holder_elsewhere_that_moves_is_alive(file, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease, "SILENCE_SECONDS", 60.0)
    first = Lease(file, "the run")
    monkeypatch.setattr(lease, "_machine", lambda: "elsewhere")
    began = time.monotonic()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        Lease(file, "the run")
    assert time.monotonic() - began < 30
    first.release()


def test_who_waits_gets_it_when_the_holder_has_ended(file, capsys):
    first = Lease(file, "the run")
    threading.Timer(0.2, first.release).start()
    began = time.monotonic()
    Lease(file, "the run", waits=True).release()
    assert 0.1 < time.monotonic() - began < 30
    assert "waiting for the end of process" in capsys.readouterr().err


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    """With and without hard links."""
    if request.param == "no links":

        def link(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("links")
def test_of_two_that_follow_one_has_it(file, monkeypatch):
    """The second has judged the dead one's lease, and takes away the first's instead."""
    left_by(file)
    rename = os.rename
    first: list[Any] = []

    def late(source, target):
        if not first:
            first.append(None)  # so that the first one's own goes through
            first[0] = Lease(file, "the run")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        Lease(file, "the run")
    monkeypatch.setattr(os, "rename", rename)
    (held,) = first
    assert said(file)["token"] == held._me.token
    held.check()
    assert os.listdir(file.parent) == [".lease"]
    held.release()
    assert not file.exists()


@pytest.mark.usefixtures("links")
def test_one_that_came_between_is_found_after_a_moment(file, monkeypatch):
    """The dead one's lease is away, ours is there, and somebody takes it for the dead one's."""
    left_by(file)
    sleep = time.sleep
    theirs: list[Lease] = []

    def settle(seconds):
        if not theirs:
            file.unlink()
            theirs.append(Lease(file, "the run"))
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", settle)
    with pytest.raises(UserError, match="in use by"):
        Lease(file, "the run")
    theirs[0].release()


def test_a_holder_that_was_followed_notices_and_leaves_the_other_alone(file):
    lines: list[str] = []
    held = Lease(file, "the run", lost=lines.append)
    held.check()
    assert lines == []
    theirs = left_by(file, host="there", pid=7)
    held.check()
    assert lines == [
        "the run is no longer this process's: it was suspended, and its place was taken by process"
        " 7 on there, since 1970-01-01. Run the same command again when nobody uses it."
    ]
    held.check()
    held.release()
    assert len(lines) == 1
    assert file.read_bytes() == theirs


def test_a_lease_that_is_anothers_is_neither_removed_nor_moved(file):
    held = Lease(file, "the run")
    theirs = left_by(file)
    held._move()
    assert file.read_bytes() == theirs
    held.release()
    assert file.read_bytes() == theirs
    assert os.listdir(file.parent) == [".lease"]


def test_its_thread_notices_too(file, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    noticed = threading.Event()
    Lease(file, "the run", lost=lambda _: noticed.set())
    theirs = left_by(file)
    assert noticed.wait(30)
    assert file.read_bytes() == theirs, "the counter of a lease that is another's was moved"


def test_a_lease_that_is_being_looked_at_is_put_back(file):
    held = Lease(file, "the run")
    file.unlink()
    held.check()
    assert said(file)["token"] == held._me.token
    held.release()
    lines: list[str] = []
    held = Lease(file, "the run", lost=lines.append)
    file.unlink()
    file.parent.rmdir()
    held.check()
    assert "its directory has been removed" in lines[0]


def test_a_forked_child_does_not_give_it_back(file, monkeypatch):
    held = Lease(file, "the run")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        held.release()
    assert file.exists()
    held.release()
    assert not file.exists()


def test_what_the_killed_left_goes(file):
    file.parent.mkdir()
    (file.parent / ".lease.0123").write_text("")
    (file.parent / ".leased").write_text("")
    Lease(file, "the run").release()
    assert os.listdir(file.parent) == [".leased"]


def test_where_none_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file: give a directory"):
        Lease(tmp_path / "file" / ".lease", "the run")
    with pytest.raises(UserError, match=r"cannot write .*below"):
        Lease(tmp_path / "file" / "below" / ".lease", "the run")


RACE = """
import sys, time
from pathlib import Path
from ditjax.errors import UserError
from ditjax.files.lease import Lease
print("ready", flush=True)
sys.stdin.readline()
try:
    held = Lease(sys.argv[1], "the run")
    print("has it", flush=True)
except UserError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


def started(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_of_many_processes_one_has_it(file):
    left_by(file)
    processes = [started(RACE, file) for _ in range(4)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        lines = [process.stdout.readline() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    (winner,) = (k for k, line in enumerate(lines) if line == "has it\n")
    assert said(file)["pid"] == processes[winner].pid
    assert sum(f"process {processes[winner].pid} on" in line for line in lines) == 3


SUSPENDED = """
import sys, time
from ditjax.files import lease
lease.RENEW_SECONDS = 0.05
lease._machine = lambda: "elsewhere"
lease.Lease(sys.argv[1], "the run")
print("has it", flush=True)
time.sleep(60)
print("wrote on")
"""


def test_a_process_that_stood_still_ends_when_it_goes_on(file):
    process = started(SUSPENDED, file)
    try:
        assert process.stdout.readline() == "has it\n"
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        ours = Lease(file, "the run")
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: the run is no longer this process's: it was suspended, and its")
    assert err.count("\n") == 1
    ours.check()
    ours.release()
