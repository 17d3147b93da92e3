"""Keeps the processes of a run together: they meet, compare settings, and end together.

Process 0 listens. Every other process connects to it and holds that connection for its lifetime.
The kernel closes the connection when a process dies, whatever its devices are doing, and a process
that hangs stops sending. In either case all others end within a second, with a line that names the
process and its host. JAX alone ends them after its heartbeat timeout, with an abort in C++, and
hangs if one process ended with an error of its own.

Messages are lines of JSON: {"index", "count", "host", "shared"} from each process that connects,
{"go": {...}} to all once they have met, {} as a heartbeat every second, {"end": text, "status": n}
to end the run, {"bye": true} when a process is done.

A process that is asked to stop sends {"request": why} to process 0, which sends {"halt": true} to
all. No process starts another step then; each answers {"reached": step}. {"stop": step, "why": why}
lets all continue to one step after the furthest, where they stop together.
"""

import contextlib
import json
import os
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ditjax.errors import UserError

REPORT_AFTER_SECONDS = 10.0  # until a line names the processes that are waited for
FAREWELL_SECONDS = 0.3  # from the last message to the exit


class Link:
    """The connection to another process, which carries lines of JSON both ways."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.last_received = connection, time.monotonic()
        self.index, self.host = -1, ""  # of the other process
        self._rest = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. Errors are ignored: `receive` reports a closed connection."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for data and return the complete messages; None if the connection is closed."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.last_received = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return found if all(isinstance(message, dict) for message in found) else None

    def receive_first(self, seconds: float) -> dict[str, Any] | None:
        """Wait for a message; None if none came, or if the connection is closed."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.socket.settimeout(left)
            messages = self.receive()
            if messages is None or messages:
                return messages[0] if messages else None
        return None

    def is_closed(self) -> bool:
        """Whether the other process has closed the connection."""
        readable = select.select([self.socket], [], [], 0)[0]
        try:
            return bool(readable) and not self.socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return True


class Stop:
    """The step after which all processes stop, once they have agreed on one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reached, self._halted = -1, False
        self.at: int | None = None
        self.why = ""

    def passed(self, step: int) -> bool:
        """Whether to stop after this step; the training calls it after each, and before the first.

        Blocks while the processes agree on a step.
        """
        with self._changed:
            while self._halted:
                self._changed.wait()
            self._reached = step
            return self.at is not None and step >= self.at

    def halt(self) -> int:
        """Make `passed` block from now on, and return the last step that it was called with."""
        with self._changed:
            self._halted = True
            return self._reached

    def settle(self, at: int, why: str) -> None:
        """Set the step that was agreed on, and let `passed` continue."""
        with self._changed:
            self.at, self.why, self._halted = at, why, False
            self._changed.notify_all()


class Watch:
    """One process's part in the watch, run by a thread of its own until `close`.

    `go` is what process 0 sent to all when they had met. `end_process` exits with a status.
    """

    def __init__(
        self,
        index: int,
        count: int,
        silence_seconds: float,
        links: list[Link],
        go: Mapping[str, Any],
        listener: socket.socket | None = None,
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        self.index, self.count, self.go = index, count, go
        self._silence, self._links, self._listener = silence_seconds, links, listener
        self._end_process = end_process
        self.stop = Stop()
        self._request = ""  # of this process; only the watch's thread sends it
        self._why = ""  # in process 0: the reason for which it has halted all
        self._reached: dict[int, int] = {}
        self._ending = threading.Lock()  # the first reason is the one that is reported
        self._closed = False
        self._selector = selectors.DefaultSelector()
        for link in links:
            link.socket.settimeout(5.0)
            link.last_received = time.monotonic()
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        if listener:
            self._selector.register(listener, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def name(self, index: int) -> str:
        """'process 1 of 2 (HOST)'."""
        return f"process {index} of {self.count} ({self.go['hosts'][index]})"

    def request_stop(self, why: str) -> None:
        """Ask all processes to stop after the same step, and return at once; see `stop`."""
        self._request = why

    def abort(self, line: str, status: int) -> None:
        """End this process with an error, and all others with it."""
        self._end(line, f"{self.name(self.index)} ended: {line}", status)

    def _end(self, line: str, to_others: str, status: int) -> None:
        with self._ending:
            if self._closed:
                return
            self._closed = True
            for link in self._links:
                link.send({"end": to_others, "status": status})
            sys.stdout.flush()
            # In one write: other threads may print at the same moment.
            sys.stderr.write(f"error: {line}\n")
            sys.stderr.flush()
            # Closing a socket with unread data would discard what was just sent.
            time.sleep(FAREWELL_SECONDS)
            self._end_process(status)

    def close(self) -> None:
        """End the watch after the run is done: from now on any process may exit."""
        self._closed = True
        for link in self._links:
            link.send({"bye": True})
        self._thread.join(5.0)
        for link in self._links:
            link.socket.close()
        if self._listener:
            self._listener.close()

    def _run(self) -> None:
        period = min(1.0, self._silence / 4)
        last_sent = 0.0
        while not self._closed:
            for key, _ in self._selector.select(min(period, 0.2)):
                if key.data is None:
                    self._refuse_late()
                else:
                    self._receive(key.data)
            self._agree()
            now = time.monotonic()
            if now - last_sent >= period:
                last_sent = now
                for link in self._links:
                    link.send({})
            for link in self._links:
                if now - link.last_received > self._silence and not self._closed:
                    self._lost(link, f"did not respond for {self._silence:g} s")

    def _agree(self) -> None:
        """Take the next step of the agreement to stop."""
        if self._request and self.index > 0:
            for link in self._links:
                link.send({"request": self._request})
            self._request = ""
        if self._request and self.index == 0 and not self._why:
            self._why = self._request
            self._reached = {0: self.stop.halt()}
            for link in self._links:
                link.send({"halt": True})
        if self._why and self.stop.at is None and len(self._reached) == self.count:
            at = max(self._reached.values()) + 1
            for link in self._links:
                link.send({"stop": at, "why": self._why})
            self.stop.settle(at, self._why)

    def _receive(self, link: Link) -> None:
        messages = link.receive()
        for message in messages or ():
            if "end" in message:
                self._drop(link)
                text = str(message["end"])
                self._end(text, text, int(message["status"]))
            if "request" in message:
                self._request = self._request or str(message["request"])
            if "halt" in message:
                link.send({"reached": self.stop.halt()})
            if "reached" in message:
                self._reached[link.index] = int(message["reached"])
            if "stop" in message:
                self.stop.settle(int(message["stop"]), str(message["why"]))
            if "bye" in message:
                self._drop(link)
        if messages is None and link in self._links and not self._closed:
            self._lost(link, "is gone")

    def _lost(self, link: Link, how: str) -> None:
        self._drop(link)
        text = (
            f"{self.name(link.index)} {how}, so this run ends: find the cause there, then run the"
            " same command on all again to resume from the newest checkpoint"
        )
        self._end(text, text, 1)

    def _drop(self, link: Link) -> None:
        self._selector.unregister(link.socket)
        self._links = [other for other in self._links if other is not link]

    def _refuse_late(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        text = f"the {self.count} processes of this run have met already: was one started twice?"
        with connection:
            connection.settimeout(1.0)
            Link(connection).send({"end": text, "status": 2})


def lead(
    port: int,
    count: int,
    shared: Mapping[str, Any],
    seconds: float,
    silence_seconds: float,
    give: Mapping[str, Any],
    end_process: Callable[[int], None] = os._exit,
    bind: str = "",
) -> Watch:
    """Start process 0 of `count`: wait until all others have connected with the same `shared`.

    It listens at the address `bind`, by default at all of this host. `give`, with "hosts" added, is
    sent to all as Watch.go. Raises UserError, in all processes that have connected, if one does not
    connect within `seconds`, connects twice, or has another value of `shared`.
    """
    try:
        listener = _listen(bind, port)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {port}: {error.strerror}; is a process 0 running"
            " here already? Choose another port, the same in every process."
        ) from None
    links: dict[int, Link] = {}
    try:
        _gather(listener, links, count, shared, seconds)
    except UserError as error:
        for link in links.values():
            link.send({"end": str(error), "status": 2})
        listener.close()
        raise
    hosts = [socket.gethostname(), *(links[index].host for index in range(1, count))]
    go = {**give, "hosts": hosts}
    for link in links.values():
        link.send({"go": go})
    return Watch(0, count, silence_seconds, list(links.values()), go, listener, end_process)


def _listen(bind: str, port: int) -> socket.socket:
    if not bind and socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    return socket.create_server((bind, port), family=family, backlog=1024)


def _gather(
    listener: socket.socket,
    links: dict[int, Link],
    count: int,
    shared: Mapping[str, Any],
    seconds: float,
) -> None:
    """Fill `links` with all other processes. Raises UserError."""
    began, reported = time.monotonic(), False
    while len(links) < count - 1:
        waited = time.monotonic() - began
        missing = ", ".join(str(i) for i in range(1, count) if i not in links)
        if waited > seconds:
            raise UserError(
                f"of the {count} processes, {missing} did not connect within {seconds:g} s"
                " (config.distributed.initialization_seconds): check that it runs, and that it can"
                " reach this host."
            )
        if waited > REPORT_AFTER_SECONDS and not reported:
            reported = True
            print(f"waiting for process {missing} of {count}", file=sys.stderr, flush=True)
        listener.settimeout(min(1.0, max(0.01, seconds - waited)))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        link = Link(connection)
        hello = link.receive_first(5.0)
        try:
            link.index, link.host = int(hello["index"]), str(hello["host"])  # type: ignore[index]
            its_count, its_shared = int(hello["count"]), dict(hello["shared"])  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            connection.close()  # not a process of ditjax
            continue
        old = links.get(link.index)
        links[link.index] = link
        _check_hello(link, old, its_count, its_shared, count, shared)


def _check_hello(
    link: Link,
    old: Link | None,
    its_count: int,
    its_shared: Mapping[str, Any],
    count: int,
    shared: Mapping[str, Any],
) -> None:
    """Raise UserError for a process that does not fit; `old` is an earlier one of its index."""
    index, host = link.index, link.host
    if its_count != count:
        raise UserError(
            f"process {index} ({host}) was started as one of {its_count} processes, process 0 of"
            f" {count}: give all the same number."
        )
    if not 0 < index < count or (old and not old.is_closed()):
        if old:
            old.send({"end": f"process {index} of {count} was started twice", "status": 2})
        raise UserError(
            f"two processes were started as number {index} of {count}: give each its own."
        )
    for key in (*shared, *its_shared):
        if shared.get(key) != its_shared.get(key):
            raise UserError(
                f"process {index} of {count} ({host}) has {key}={its_shared.get(key)!r},"
                f" process 0 has {shared.get(key)!r}: give all the same command."
            )


def join(
    host: str,
    port: int,
    index: int,
    count: int,
    shared: Mapping[str, Any],
    seconds: float,
    silence_seconds: float,
    end_process: Callable[[int], None] = os._exit,
) -> Watch:
    """Start process `index` of `count`: connect to process 0 at host:port and wait for its go.

    Raises UserError if process 0 does not answer within `seconds`, or refuses this process.
    """
    link = Link(_connect(host, port, index, count, seconds))
    link.index = 0
    link.send({"index": index, "count": count, "host": socket.gethostname(), "shared": shared})
    # Process 0 gives up first, and reports which process it waited for.
    answer = link.receive_first(seconds + 10.0)
    if answer and "end" in answer:
        raise UserError(str(answer["end"]))
    if not answer or "go" not in answer:
        raise UserError(
            f"process 0 of {count} at {host}:{port} ended before all had met: see its output."
        )
    return Watch(index, count, silence_seconds, [link], answer["go"], None, end_process)


def _connect(host: str, port: int, index: int, count: int, seconds: float) -> socket.socket:
    began, reported = time.monotonic(), False
    while True:
        waited = time.monotonic() - began
        try:
            left = max(0.1, min(5.0, seconds - waited))
            connection = socket.create_connection((host, port), timeout=left)
            # On one machine a socket may connect to itself if nobody listens at the port.
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()
            why = "nobody listens"
        except OSError as error:
            why = error.strerror or str(error)
        where = f"process 0 of {count} does not answer at {host}:{port} ({why})"
        if waited > seconds:
            raise UserError(
                f"{where} for {seconds:g} s (config.distributed.initialization_seconds): check that"
                f" it runs, and that process {index} was given its address."
            )
        if waited > REPORT_AFTER_SECONDS and not reported:
            reported = True
            print(f"waiting: {where}", file=sys.stderr, flush=True)
        time.sleep(0.2)
