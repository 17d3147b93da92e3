"""Who may write to a directory: one process, on network file systems too.

A lease is a small file that names its holder (host, process, since when) and has a counter, which a
thread moves every few seconds. No lock of the file system is used: on network file systems those
do not work everywhere, or outlive their holders.

- It comes into being whole, or not at all: link(2) of a file that was written before, or O_EXCL
  where a file system has no links.
- A holder on this machine is looked up by its number and the moment that it began: when it is gone
  the next one follows at once. A holder on another machine counts as gone when its lease has not
  moved for SILENCE_SECONDS of the waiting process's own clock: no two clocks are compared.
- A lease is taken away by a rename to a name of one's own. Of several that try one gets it; who
  finds that it holds another lease than the one that it judged puts it back.
- A holder that stood still until another took its place finds that name in the file, at its next
  turn or before it saves (`check`), and ends.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from ditjax.errors import UserError
from ditjax.files.masking import printable

FILE = ".lease"  # of a directory as a whole
RENEW_SECONDS = 5.0
SILENCE_SECONDS = 30.0
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 15.0  # for a lease to move, of one that only looks
SETTLE_SECONDS = 0.05  # for another who has just taken our lease aside to put it back

# What link(2) says where there are no links.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}


class Holder(NamedTuple):
    """What a lease says. `machine` tells boots and process namespaces apart, `began` processes."""

    host: str
    machine: str
    pid: int
    began: str
    since: str
    token: str

    def __str__(self) -> str:
        return printable(f"process {self.pid} on {self.host}, since {self.since}")


class Lease:
    """A lease that this process has from here to `release`.

    Waits to see whether a holder on another machine is alive; with `waits` until any holder has
    ended. Raises UserError that names the holder, or where the file cannot be written. `lost` is
    called with a line, in whatever thread, when another process has taken it.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        what: str,
        *,
        waits: bool = False,
        lost: Callable[[str], object] | None = None,
    ) -> None:
        self.file, self._what = Path(os.path.abspath(file)), what
        self._waits, self._lost = waits, lost or end
        self._made: list[Path] = []  # the directories that were not there, the innermost first
        self._turn = 0
        self._changing = threading.Lock()
        self._stop = threading.Event()
        self._me = Holder(
            socket.gethostname(),
            _machine(),
            os.getpid(),
            _began(os.getpid()) or "",
            time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            secrets.token_hex(8),
        )
        try:
            self._acquire()
        except OSError as error:
            self._remove_what_was_made()
            raise UserError(
                f"cannot write {self.file}: {error.strerror or error}; choose a folder that can be"
                " written."
            ) from error
        except BaseException:
            self._remove_what_was_made()
            raise
        self._held = True
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def check(self) -> None:
        """Asks the file whether the lease is still ours: if not, `lost`."""
        with self._changing:
            taker = self._taker() if self._held else None
            if taker is None:
                return
            self._held = False
        self._stop.set()
        self._lost(
            f"{self._what} is no longer this process's: {taker}. The same command goes on when"
            " nobody has it."
        )

    def release(self) -> None:
        """The next may have it. Directories that were made for it and are empty go too."""
        self._stop.set()
        with self._changing:
            # A forked child has a copy of this, and no right to it.
            if not self._held or os.getpid() != self._me.pid:
                return
            self._held = False
            with contextlib.suppress(OSError):
                self._take_away(lambda found: _token_of(found) == self._me.token)
            self._remove_what_was_made()

    def _acquire(self) -> None:
        succeeds = told = False
        seen: tuple[bytes, float] | None = None  # the lease from another machine, and since when
        while True:
            if self._create():
                if not succeeds:
                    break
                time.sleep(SETTLE_SECONDS)
                if _token_of(_read(self.file)) == self._me.token:
                    break
            found = _read(self.file)
            if found is None:
                continue
            holder = _holder_of(found)
            if holder and holder.machine == self._me.machine:
                alive = _is_alive(holder)
                gone = not alive
            else:
                alive = seen is not None and found != seen[0]
                if seen is None or alive:
                    seen = found, time.monotonic()
                gone = time.monotonic() - seen[1] > SILENCE_SECONDS
            who = str(holder or f"a process that {self.file} does not name")
            if gone:
                self._take_away(lambda now, judged=found: now == judged)  # type: ignore[misc]
                succeeds = True
                continue
            if alive and not self._waits:
                raise UserError(
                    f"{self._what} is in use by {who}: end that one first, or give another"
                    f" directory (its lease is {self.file})."
                )
            if not told:
                told = True
                bound = (
                    ""
                    if holder and holder.machine == self._me.machine
                    else (f", or {SILENCE_SECONDS:g} s without a sign of it")
                )
                line = f"waiting for the end of {who}, which has {self._what}{bound}"
                print(line, file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
        # What processes that were killed just then have left.
        for path in self.file.parent.glob(f"{self.file.name}.*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _create(self) -> bool:
        """Whether the lease is ours now; makes its directory."""
        folder = self.file.parent
        if not folder.is_dir():
            if folder.exists():
                raise UserError(f"{folder} is a file: give a directory.")
            missing = [folder]
            while not missing[-1].parent.exists():
                missing.append(missing[-1].parent)
            self._made = missing
            folder.mkdir(parents=True, exist_ok=True)
        # A network file system may have made the link, and lost its own answer.
        return self._publish(self._text()) or _token_of(_read(self.file)) == self._me.token

    def _publish(self, data: bytes) -> bool:
        """Puts the file there, unless there is one."""
        draft = self._name_of_our_own()
        try:
            _write_new(draft, data)
            _link(draft, self.file, data)
        except (FileExistsError, FileNotFoundError):
            return False  # not found: the folder has just gone, or the holder has tidied up
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()
        return True

    def _take_away(self, is_meant: Callable[[bytes], bool]) -> None:
        """Removes the lease, if it is the one that is meant."""
        aside = self._name_of_our_own()
        try:
            os.rename(self.file, aside)
        except FileNotFoundError:
            return
        found = _read(aside)
        if found is not None and not is_meant(found):
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                _link(aside, self.file, found)
        with contextlib.suppress(OSError):
            aside.unlink()

    def _taker(self) -> str | None:
        """What has become of the lease; None while it is ours."""
        try:
            # Not there: taken aside by one who will find that it is not the one that it meant.
            if (found := _read(self.file)) is None and self._publish(self._text()):
                return None
            found = _read(self.file)
        except OSError:
            return None  # what cannot be asked now cannot be written to either
        if _token_of(found) == self._me.token:
            return None
        if found is None:
            return "its directory has been removed"
        return f"it stood still, and its place was taken by {_holder_of(found) or 'another one'}"

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            self.check()
            with self._changing, contextlib.suppress(OSError):
                if self._held:
                    self._move()

    def _move(self) -> None:
        """The counter, in the file itself: a lease that was taken aside meanwhile moves there."""
        self._turn += 1
        handle = os.open(self.file, os.O_RDWR)
        try:
            if _token_of(os.read(handle, 4096)) == self._me.token:
                os.pwrite(handle, self._text(), 0)
        finally:
            os.close(handle)

    def _text(self) -> bytes:
        """Of one length, whatever the counter."""
        return json.dumps({**self._me._asdict(), "turn": f"{self._turn:012}"}).encode() + b"\n"

    def _name_of_our_own(self) -> Path:
        return self.file.with_name(f"{self.file.name}.{secrets.token_hex(8)}")

    def _remove_what_was_made(self) -> None:
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()


def holders(files: Iterable[Path], patience: float) -> dict[Path, Holder]:
    """The leases that are held, and by whom; nothing is touched, nothing waits to have one.

    Of a holder on another machine it is told by its lease's moving: `patience` seconds are waited
    for that. With 0 each is believed.
    """
    here = _machine()
    found: dict[Path, Holder] = {}
    silent: dict[Path, bytes] = {}
    for file in files:
        with contextlib.suppress(OSError):
            data = _read(file)
            if data is None or (holder := _holder_of(data)) is None:
                continue
            if holder.machine == here:
                if _is_alive(holder):
                    found[file] = holder
            elif patience > 0:
                silent[file] = data
            else:
                found[file] = holder
    until = time.monotonic() + patience
    while silent and time.monotonic() < until:
        time.sleep(min(POLL_SECONDS, patience))
        for file, before in list(silent.items()):
            with contextlib.suppress(OSError):
                if (data := _read(file)) != before:
                    del silent[file]
                    if holder := _holder_of(data):
                        found[file] = holder
    return found


# As a lock of the operating system: a process has it or not, whichever function took it.
_leases: dict[Path, Lease] = {}


def own(
    file: str | os.PathLike[str],
    what: str,
    *,
    waits: bool = False,
    lost: Callable[[str], object] | None = None,
) -> None:
    """Has the lease, until the `scope` around this ends; nothing where we have it already.

    Raises UserError: see `Lease`.
    """
    path = Path(os.path.realpath(file))
    if path not in _leases:
        _leases[path] = Lease(path, what, waits=waits, lost=lost)


def check() -> None:
    """Before what must not be written by two: every lease of this process is still ours."""
    for lease in list(_leases.values()):
        lease.check()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """What is taken within is given back at its end, however it ends; a decorator, too."""
    before = set(_leases)
    try:
        yield
    finally:
        for path in _leases.keys() - before:
            _leases.pop(path).release()


def end(line: str) -> NoReturn:
    """The process ends with a line and status 1; no thread of it writes anything more."""
    # In one piece: others may write there at the same moment.
    sys.stderr.write(f"error: {printable(line)}\n")
    sys.stderr.flush()
    os._exit(1)


def _link(source: Path, target: Path, data: bytes) -> None:
    """`source`, which holds `data`, under a second name. Raises FileExistsError."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _write_new(target, data)


def _write_new(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)


def _read(path: Path) -> bytes | None:
    """None where it is not there."""
    try:
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise


def _holder_of(data: bytes | None) -> Holder | None:
    """None for what is no whole lease."""
    try:
        said = json.loads(data or b"")
        holder = Holder(**{key: said[key] for key in Holder._fields})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = [value for value in holder if isinstance(value, str)]
    pid = holder.pid
    sound = type(pid) is int and 0 < pid < 2**31 and len(texts) == len(holder) - 1
    return holder if sound else None


def _token_of(data: bytes | None) -> str | None:
    holder = _holder_of(data)
    return holder.token if holder else None


def _is_alive(holder: Holder) -> bool:
    """Of a holder on this machine."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    began = _began(holder.pid)
    return began is not None and (not began or not holder.began or began == holder.began)


def _began(pid: int) -> str | None:
    """When a process that is there began, by the system's own count; '' where that is hidden.

    None for one that has ended and waits for its parent to notice.
    """
    try:
        if sys.platform == "linux":
            # proc(5): the name, in brackets, may hold anything; then the state, field 3.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2]
            state, began = fields.split()[0], fields.split()[19]
        else:
            told = subprocess.run(
                ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            )
            state, _, began = told.stdout.strip().partition(" ")
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""
    return None if state[:1] in ("Z", "X") else began.strip()


def _machine() -> str:
    """Where a process number means what it means here: this boot, and this namespace of them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = space = ""
    return " ".join((socket.gethostname(), boot, space)).strip()
