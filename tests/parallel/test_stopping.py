"""Told to stop: once is asked for, twice ends, and so does the grace period."""

import hashlib
import os
import signal
import threading
import time

import pytest

from ditjax.errors import StoppedError
from ditjax.parallel import stopping
from ditjax.parallel.stopping import Stopping


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_asked_for(number):
    before = signal.getsignal(number)
    ended: list[int] = []
    with Stopping(30, ended.append) as stop:
        assert stop.after(0) == ""
        send(number)
        send(number)  # by a launcher that passes on what came to the whole group
        until(lambda: stop.after(1))
        assert stop.after(2) == signal.Signals(number).name
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before
    assert ended == []
    assert signal.set_wakeup_fd(-1) == -1


def test_the_second_ends_even_while_no_python_runs(monkeypatch):
    """The main thread is in C for a while, as in a compilation."""
    monkeypatch.setattr(stopping, "ONE_SIGNAL_SECONDS", 0.02)
    ended: list[tuple[int, float]] = []

    def sender() -> None:
        for _ in range(2):
            time.sleep(0.1)
            send(signal.SIGTERM)

    began = time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
    second = round(100_000 / (time.monotonic() - began))
    with Stopping(30, lambda status: ended.append((status, time.monotonic()))) as stop:
        thread = threading.Thread(target=sender)
        thread.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", second)
        done = time.monotonic()
        thread.join()
        assert stop.after(1) == "SIGTERM"
    assert [status for status, _ in ended] == [143]
    assert ended[0][1] < done


def test_the_end_of_the_grace_period_is_told(capfd):
    ended: list[int] = []
    with Stopping(0.05, ended.append):
        send(signal.SIGTERM)
        until(lambda: ended)
    assert ended == [143]
    assert capfd.readouterr().err == (
        "error: SIGTERM, and not all was saved within config.train.grace_seconds = 0.05: ended;"
        " run the same command again to resume from the newest checkpoint\n"
    )


def test_what_is_done_within_the_grace_period_ends_nothing():
    ended: list[int] = []
    with Stopping(0.2, ended.append) as stop:
        send(signal.SIGTERM)
        until(lambda: stop.after(1))
    time.sleep(0.3)
    assert ended == []


def test_a_command_that_only_waits_gets_it_as_an_error():
    before = signal.getsignal(signal.SIGTERM)
    stopped = pytest.raises(StoppedError, match="stopped by SIGTERM")
    with stopped as error, stopping.raise_on_sigterm():
        send(signal.SIGTERM)
        time.sleep(10)
    assert error.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_hear_no_signals():
    def run() -> None:
        with Stopping(30) as stop, stopping.raise_on_sigterm():
            found.append(stop.after(1))

    found: list[str] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert found == [""]
