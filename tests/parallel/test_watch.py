"""The processes of a run meet, agree and end together; here without JAX, so in a moment."""

import contextlib
import functools
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from ditjax.errors import UserError
from ditjax.parallel import watch

SHARED = {"--workdir": "runs/one", "config.seed": 0}
# A process that meets the others and then does nothing: argv are index, count, port.
PROCESS = """
import sys, time
from ditjax.parallel import watch
index, count, port = map(int, sys.argv[1:])
if index:
    watch.join("127.0.0.1", port, index, count, {}, 20, 1.0)
else:
    watch.lead(port, count, {}, 20, 1.0, {}, bind="127.0.0.1")
print("met", flush=True)
time.sleep(60)
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Run:
    """Processes as threads: what each gives, raises, or would end with."""

    def __init__(self, count, *, silence=20.0):
        self.port, self.count, self.silence = free_port(), count, silence
        self.ended: list[queue.Queue] = [queue.Queue() for _ in range(count)]
        self.results = {}
        self.threads = []

    def process(self, index, *, count=None, shared=SHARED, seconds=10.0, port=None):
        def run():
            count_, port_ = count or self.count, port or self.port
            stop = self.ended[index].put
            try:
                if index == 0:
                    found = watch.lead(
                        port_,
                        count_,
                        shared,
                        seconds,
                        self.silence,
                        {"port": 7},
                        stop,
                        "127.0.0.1",
                    )
                else:
                    found = watch.join(
                        "127.0.0.1", port_, index, count_, shared, seconds, self.silence, stop
                    )
            except UserError as error:
                self.results.setdefault(index, []).append(str(error))
            else:
                self.results.setdefault(index, []).append(found)

        thread = threading.Thread(target=run)
        thread.start()
        self.threads.append(thread)
        return self

    def met(self):
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        return {index: found[0] for index, found in self.results.items()}

    def close(self):
        for found in self.results.values():
            for one in found:
                if isinstance(one, watch.Watch):
                    one.close()


@pytest.fixture
def runs():
    made = []

    def make(*args, **kwargs):
        made.append(Run(*args, **kwargs))
        return made[-1]

    yield make
    for run in made:
        run.close()


def test_they_meet_in_any_order_and_hear_what_process_0_gives(runs):
    met = runs(3).process(2).process(0).process(1).met()
    assert [met[i].go["port"] for i in range(3)] == [7, 7, 7]
    assert met[2].name(1) == f"process 1 of 3 ({socket.gethostname()})"


def test_a_run_that_is_done_ends_quietly(runs):
    run = runs(2).process(0).process(1)
    met = run.met()
    met[0].close()
    time.sleep(0.6)  # long enough to see that the connection is closed
    met[1].close()
    assert run.ended[0].empty()
    assert run.ended[1].empty()


@pytest.mark.parametrize("asks", [0, 2])
def test_told_to_stop_all_stop_after_the_same_step(runs, asks):
    """Steps as of a training: a process may be ahead of the slowest by a few, and they differ."""
    count, ahead = 3, 3
    run = runs(count).process(0).process(1).process(2)
    met = run.met()
    done, moved = [0] * count, threading.Condition()
    stopped: dict[int, int] = {}

    def near(step: int) -> bool:
        return step <= min(done) + ahead

    def train(index: int) -> None:
        step = 0
        while not met[index].stop.passed(step):
            step += 1
            with moved:
                assert moved.wait_for(functools.partial(near, step), 30)
                done[index] = step
                moved.notify_all()
            if index == 0:  # never the furthest; the others take steps faster than lines travel
                time.sleep(0.0003)
            if step == 20 and index == asks:
                met[index].request_stop("SIGTERM")
                met[index].request_stop("SIGTERM")
        stopped[index] = step

    threads = [threading.Thread(target=train, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len(set(stopped.values())) == 1
    assert stopped[0] > 20
    assert {watch_.stop.why for watch_ in met.values()} == {"SIGTERM"}
    assert all(ended.empty() for ended in run.ended)


def test_an_error_of_one_ends_all_and_says_whose_it_was(runs, capfd):
    run = runs(3).process(0).process(1).process(2)
    met = run.met()
    met[2].abort("record 7 is damaged.", 2)
    assert [ended.get(timeout=60) for ended in run.ended] == [2, 2, 2]
    told = capfd.readouterr().err
    assert told.count(f"process 2 of 3 ({socket.gethostname()}) ended: record 7 is damaged.\n") == 2
    assert told.count("error: record 7 is damaged.\n") == 1


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (({"index": 1}, {"index": 1}), "two processes were started as number 1 of 3"),
        (
            ({"index": 1, "count": 4},),
            "process 1 .* was started as one of 4 processes, process 0 of 3",
        ),
        (
            ({"index": 2, "shared": {**SHARED, "config.seed": 1}},),
            "process 2 of 3 .* has config.seed=1, process 0 has 0",
        ),
        (
            ({"index": 2, "shared": {**SHARED, "--step": 4}},),
            "has --step=4, process 0 has None",
        ),
    ],
)
def test_who_does_not_fit_is_told_to_all(runs, others, told):
    run = runs(3).process(0)
    for other in others:
        run.process(**other)
    run.met()
    texts = [text for found in run.results.values() for text in found]
    assert all(isinstance(text, str) for text in texts)
    assert re.search(told, run.results[0][0])
    assert len(texts) == 1 + len(others)


def test_an_index_that_is_none_is_refused(runs):
    run = runs(2).process(0)
    run.ended.append(queue.Queue())
    run.process(2)
    assert "number 2 of 2" in run.met()[0]


def test_who_does_not_come_is_named_after_the_bound(runs):
    began = time.monotonic()
    met = runs(3).process(0, seconds=1.0).process(2, seconds=1.0).met()
    assert "of the 3 processes, 1 did not connect within 1 s" in met[0]
    assert met[2] == met[0]
    assert time.monotonic() - began < 30


def test_a_wrong_address_is_told_after_the_bound(runs):
    met = runs(2).process(1, seconds=0.5).met()
    assert re.search(r"process 0 of 2 does not answer at 127.0.0.1:\d+ \(.*refused\)", met[1])


def test_a_port_that_is_taken_is_told_at_once(runs):
    with socket.create_server(("", 0)) as server:
        met = runs(2).process(0, port=server.getsockname()[1]).met()
    assert "cannot listen at port" in met[0]


def test_strangers_and_a_process_that_was_restarted_disturb_nothing(runs):
    run = runs(2)
    run.process(0)
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"index": 1}\n', b""):
        with contextlib.suppress(ConnectionRefusedError):
            connection = watch._connect("127.0.0.1", run.port, 1, 2, 5.0)
            connection.sendall(words)
            connection.close()
    # It came and died while the others were still awaited.
    run.count = 3
    again = runs(3)
    again.process(0)
    link = watch.Link(watch._connect("127.0.0.1", again.port, 1, 3, 5.0))
    link.send({"index": 1, "count": 3, "host": "old", "shared": SHARED})
    time.sleep(0.3)
    link.socket.close()
    time.sleep(0.5)  # the first process sees that, also on a busy core
    met = again.process(1).process(2).met()
    assert "old" not in met[0].go["hosts"]
    run.count = 2
    assert isinstance(run.process(1).met()[0], watch.Watch)


def test_one_that_comes_too_late_is_refused_and_the_run_goes_on(runs):
    run = runs(2).process(0).process(1)
    run.met()
    late = Run(2)
    late.port = run.port
    assert "have met already" in late.process(1).met()[1]
    assert run.ended[0].empty()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("with_signal", "how"),
    [(signal.SIGKILL, "is gone"), (signal.SIGSTOP, "did not respond for 1 s")],
)
def test_a_peer_that_dies_or_stands_still_ends_the_others(victim, with_signal, how):
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), "3", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stderr
            assert process.stdout.readline() == "met\n", process.stderr.read()
        processes[victim].send_signal(with_signal)
        for index, process in enumerate(processes):
            if index != victim:
                _, err = process.communicate(timeout=60)
                assert process.returncode == 1
                who = f"process {victim} of 3 ({socket.gethostname()})"
                assert err.startswith(f"error: {who} {how}")
                assert err.count("\n") == 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()
