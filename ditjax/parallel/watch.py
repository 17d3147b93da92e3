"""Keeps the processes of one run together: they meet, find that they agree, and end together.

Process 0 listens where all others come; each of them holds that one connection for as long as it
lives. The kernel closes it when its process dies, whatever the devices are doing at that moment;
a process that stands still stops sending. Either way every other one ends within the same second,
with a line that says which process on which host it was. JAX by itself ends them after its
heartbeat's timeout, with a C++ abort, and waits for one that ended with an error of its own.

Lines of JSON: {"index", "count", "host", "said"} from who comes, {"go": {...}} to all once all
have come, {} every second, {"end": text, "status": n} for the run's end, {"bye": true} when done.

A process that is told to stop says {"wish": why} to process 0. That says {"halt": true} to all: no
one begins another step; each answers {"reached": step}, and {"stop": step, "why": why} lets all go
on to one step more than the furthest, where they stop together.
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

LINGER_SECONDS = 10.0  # before a line says who is waited for
FAREWELL_SECONDS = 0.3  # from telling the others to the end


class Link:
    """The connection to one other process: lines of JSON both ways."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.heard = connection, time.monotonic()
        self.index, self.host = -1, ""  # of who is at the other end
        self._rest = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Tries to: who is gone is told by `receive`."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come: at least a part of a line is waited for. None: the other end is gone."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return found if all(isinstance(message, dict) for message in found) else None

    def line(self, seconds: float) -> dict[str, Any] | None:
        """The next line, waited for; None: nothing came, or the other end is gone."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.socket.settimeout(left)
            messages = self.receive()
            if messages is None or messages:
                return messages[0] if messages else None
        return None

    def is_gone(self) -> bool:
        """Whether the other end has closed."""
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
        """By the training after each step, and before the first: whether it is to stop here.

        Waits while the processes agree.
        """
        with self._changed:
            while self._halted:
                self._changed.wait()
            self._reached = step
            return self.at is not None and step >= self.at

    def halt(self) -> int:
        """From here on `passed` waits; the last step that it was told."""
        with self._changed:
            self._halted = True
            return self._reached

    def settle(self, at: int, why: str) -> None:
        """It is agreed: `passed` goes on."""
        with self._changed:
            self.at, self.why, self._halted = at, why, False
            self._changed.notify_all()


class Watch:
    """One process's part in the watch, by a thread of its own until `close`.

    `go` is what process 0 gave to all when they had met.
    """

    def __init__(
        self,
        index: int,
        count: int,
        silence_seconds: float,
        links: list[Link],
        go: Mapping[str, Any],
        listener: socket.socket | None = None,
        stop: Callable[[int], None] = os._exit,
    ) -> None:
        self.index, self.count, self.go = index, count, go
        self._silence, self._links, self._listener, self._stop = (
            silence_seconds,
            links,
            listener,
            stop,
        )
        self.stop = Stop()
        self._wish = ""  # of this process: to be said by the watch's thread, which alone sends
        self._why = ""  # of process 0: what it has told all to halt for
        self._reached: dict[int, int] = {}
        self._ending = threading.Lock()  # the first reason is the one that is told
        self._closed = False
        self._selector = selectors.DefaultSelector()
        for link in links:
            link.socket.settimeout(5.0)
            link.heard = time.monotonic()
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        if listener:
            self._selector.register(listener, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def name(self, index: int) -> str:
        """'process 1 of 2 (HOST)'."""
        return f"process {index} of {self.count} ({self.go['hosts'][index]})"

    def wish(self, why: str) -> None:
        """All processes shall stop after the same step: `stop` says when. Returns at once."""
        self._wish = why

    def leave(self, line: str, status: int) -> None:
        """This process ends with an error of its own, told in `line`: so do all others."""
        self._end(line, f"{self.name(self.index)} ended: {line}", status)

    def _end(self, line: str, told: str, status: int) -> None:
        with self._ending:
            if self._closed:
                return
            self._closed = True
            for link in self._links:
                link.send({"end": told, "status": status})
            sys.stdout.flush()
            # In one piece: others may write there at the same moment.
            sys.stderr.write(f"error: {line}\n")
            sys.stderr.flush()
            # A socket closed while something lies unread in it takes back what it has just sent.
            time.sleep(FAREWELL_SECONDS)
            self._stop(status)

    def close(self) -> None:
        """The run is done: from now on any process may go."""
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
        beaten = 0.0
        while not self._closed:
            for key, _ in self._selector.select(min(period, 0.2)):
                if key.data is None:
                    self._refuse_late()
                else:
                    self._hear(key.data)
            self._agree()
            now = time.monotonic()
            if now - beaten >= period:
                beaten = now
                for link in self._links:
                    link.send({})
            for link in self._links:
                if now - link.heard > self._silence and not self._closed:
                    self._lost(link, f"was not heard of for {self._silence:g} s")

    def _agree(self) -> None:
        """What the wish to stop asks for next."""
        if self._wish and self.index > 0:
            for link in self._links:
                link.send({"wish": self._wish})
            self._wish = ""
        if self._wish and self.index == 0 and not self._why:
            self._why = self._wish
            self._reached = {0: self.stop.halt()}
            for link in self._links:
                link.send({"halt": True})
        if self._why and self.stop.at is None and len(self._reached) == self.count:
            at = max(self._reached.values()) + 1
            for link in self._links:
                link.send({"stop": at, "why": self._why})
            self.stop.settle(at, self._why)

    def _hear(self, link: Link) -> None:
        messages = link.receive()
        for message in messages or ():
            if "end" in message:
                self._drop(link)
                text = str(message["end"])
                self._end(text, text, int(message["status"]))
            if "wish" in message:
                self._wish = self._wish or str(message["wish"])
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
            f"{self.name(link.index)} {how}, so this run ends: find out why there; the same command"
            " on all goes on from the newest checkpoint"
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
        text = f"the {self.count} processes of this run have met already: is one started twice?"
        with connection:
            connection.settimeout(1.0)
            Link(connection).send({"end": text, "status": 2})


def first(
    port: int,
    count: int,
    said: Mapping[str, Any],
    seconds: float,
    silence_seconds: float,
    give: Mapping[str, Any],
    stop: Callable[[int], None] = os._exit,
    bind: str = "",
) -> Watch:
    """Process 0 of `count`: waits until all others have come and say the same; then all go.

    It listens at the address `bind`; '' is every one of this host. `give` goes to all as Watch.go,
    with "hosts". Raises UserError, which all that have come get too: for one that does not come
    within `seconds`, comes twice, or says another thing.
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
        _gather(listener, links, count, said, seconds)
    except UserError as error:
        for link in links.values():
            link.send({"end": str(error), "status": 2})
        listener.close()
        raise
    hosts = [socket.gethostname(), *(links[index].host for index in range(1, count))]
    go = {**give, "hosts": hosts}
    for link in links.values():
        link.send({"go": go})
    return Watch(0, count, silence_seconds, list(links.values()), go, listener, stop)


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
    said: Mapping[str, Any],
    seconds: float,
) -> None:
    """Fills `links` with all others. Raises UserError."""
    began, told = time.monotonic(), False
    while len(links) < count - 1:
        waited = time.monotonic() - began
        missing = ", ".join(str(i) for i in range(1, count) if i not in links)
        if waited > seconds:
            raise UserError(
                f"of the {count} processes, {missing} did not come within {seconds:g} s"
                " (config.distributed.initialization_seconds): see that it runs, and reaches this"
                " host."
            )
        if waited > LINGER_SECONDS and not told:
            told = True
            print(f"waiting for process {missing} of {count}", file=sys.stderr, flush=True)
        listener.settimeout(min(1.0, max(0.01, seconds - waited)))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        link = Link(connection)
        hello = link.line(5.0)
        try:
            index, there = int(hello["index"]), int(hello["count"])  # type: ignore[index]
            link.index, link.host, theirs = index, str(hello["host"]), dict(hello["said"])  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            connection.close()  # not one of ours
            continue
        old = links.get(index)
        links[index] = link
        if there != count:
            raise UserError(
                f"process {index} ({link.host}) was told of {there} processes, process 0 of"
                f" {count}: give all the same number."
            )
        if not 0 < index < count or (old and not old.is_gone()):
            if old:
                old.send({"end": f"process {index} of {count} was started twice", "status": 2})
            raise UserError(
                f"two processes say that they are number {index} of {count}: give each its own."
            )
        for key in (*said, *theirs):
            if said.get(key) != theirs.get(key):
                raise UserError(
                    f"process {index} of {count} ({link.host}) has {key}={theirs.get(key)!r},"
                    f" process 0 has {said.get(key)!r}: give all the same command."
                )


def another(
    host: str,
    port: int,
    index: int,
    count: int,
    said: Mapping[str, Any],
    seconds: float,
    silence_seconds: float,
    stop: Callable[[int], None] = os._exit,
) -> Watch:
    """Process `index` of `count`: comes to process 0 at host:port and waits for its go.

    Raises UserError when nobody answers there within `seconds`, and what process 0 refuses.
    """
    link = Link(_connect(host, port, index, count, seconds))
    link.index = 0
    link.send({"index": index, "count": count, "host": socket.gethostname(), "said": said})
    # Process 0 gives up first, and says for whom it waited.
    answer = link.line(seconds + 10.0)
    if answer and "end" in answer:
        raise UserError(str(answer["end"]))
    if not answer or "go" not in answer:
        raise UserError(
            f"process 0 of {count} at {host}:{port} is gone before all have met: see its output."
        )
    return Watch(index, count, silence_seconds, [link], answer["go"], None, stop)


def _connect(host: str, port: int, index: int, count: int, seconds: float) -> socket.socket:
    began, told = time.monotonic(), False
    while True:
        waited = time.monotonic() - began
        try:
            left = max(0.1, min(5.0, seconds - waited))
            connection = socket.create_connection((host, port), timeout=left)
            # Where nobody listens a port may be met by itself, on one machine.
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()
            why = "nobody listens"
        except OSError as error:
            why = error.strerror or str(error)
        where = f"process 0 of {count} does not answer at {host}:{port} ({why})"
        if waited > seconds:
            raise UserError(
                f"{where} for {seconds:g} s (config.distributed.initialization_seconds): see that"
                f" it runs, and that the address that process {index} got is its own."
            )
        if waited > LINGER_SECONDS and not told:
            told = True
            print(f"waiting: {where}", file=sys.stderr, flush=True)
        time.sleep(0.2)
