"""Leases: only one process writes to a directory, on network file systems too.

A lease is a small file with its holder (host, process, start time) and a counter that a thread of
the holder advances every few seconds. Locks of the file system are not used: on network file
systems they do not work everywhere, or outlive their holders.

- The file appears whole or not at all: by link(2) of a file written before, or by O_EXCL on a file
  system without links.
- A holder on this machine is looked up by its process number and start time, so that the next
  process follows at once when it is gone. A holder on another machine counts as gone if its lease
  has not changed for SILENCE_SECONDS of the waiting process's clock; clocks are never compared.
- A lease is removed by renaming it to a unique name. Of several processes that try, one succeeds;
  it puts the file back if it is not the lease that it had judged.
- On a store (gs://, s3://) there are neither links nor renames: `ObjectLease` writes only if nobody
  else has written.
- A holder that was suspended until another process took its place finds that process in the file,
  at its next turn or before it saves (`check_held`), and ends.
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

from ditjax.errors import UserError, one_line
from ditjax.files import store
from ditjax.files.atomic import unwritable

FILE = ".lease"  # the lease of a whole directory
RENEW_SECONDS = 5.0
SILENCE_SECONDS = 30.0
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 15.0  # how long `holders` waits for a lease to change
SETTLE_SECONDS = 0.05  # time for a process that has just renamed our lease to put it back

# The errors of link(2) on a file system without links.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}


class Holder(NamedTuple):
    """The content of a lease. `machine` identifies a boot and a process namespace."""

    host: str
    machine: str
    pid: int
    began: str
    since: str
    token: str

    def __str__(self) -> str:
        return one_line(f"process {self.pid} on {self.host}, since {self.since}")


class Lease:
    """A lease that this process holds from here until `release`.

    Waits to see whether a holder on another machine is alive; with `waits`, until any holder has
    ended. `lost` is called with a line, in any thread, if another process takes the lease. Raises
    UserError with the name of the holder, or if the file cannot be written.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        what: str,
        *,
        waits: bool = False,
        lost: Callable[[str], object] | None = None,
    ) -> None:
        self.file, self._what = store.place(file).absolute(), what
        self._waits, self._lost = waits, lost or end_process
        self._made: list[Path] = []  # directories made for the lease, the innermost first
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
        except BaseException as error:
            self._remove_made()
            if isinstance(error, OSError):
                raise UserError(unwritable(self.file, error)) from error
            raise
        self._held = True
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def check(self) -> None:
        """Call `lost` if the file is no longer this lease."""
        with self._changing:
            fate = self._fate() if self._held else None
            if fate is None:
                return
            self._held = False
        self._stop.set()
        self._lost(
            f"{self._what} is no longer this process's: {fate}. Run the same command again when"
            " nobody uses it."
        )

    def release(self) -> None:
        """Give the lease up, and remove the directories that were made for it and are empty."""
        self._stop.set()
        with self._changing:
            # A forked child has a copy of this object, but not the lease.
            if not self._held or os.getpid() != self._me.pid:
                return
            self._held = False
            with contextlib.suppress(OSError):
                self._take_away(self._is_mine)
            self._remove_made()

    def _acquire(self) -> None:
        succeeds = reported = False
        seen: tuple[bytes, float] | None = None  # a lease from another machine, and since when
        while not (self._create() and (not succeeds or self._is_settled())):
            found = _read(self.file)
            if found is None:
                continue
            holder = _holder_of(found)
            here = holder is not None and holder.machine == self._me.machine
            if holder and here:
                alive = _is_alive(holder)
                gone = not alive
            else:
                alive = seen is not None and found != seen[0]
                if seen is None or alive:
                    seen = found, time.monotonic()
                gone = time.monotonic() - seen[1] > SILENCE_SECONDS
            if gone:
                self._take_away(lambda now, judged=found: now == judged)  # type: ignore[misc]
                succeeds = True
                continue
            who = str(holder or f"a process that {self.file} does not name")
            if alive and not self._waits:
                raise UserError(
                    f"{self._what} is in use by {who}: end that process first, or give another"
                    f" directory (its lease is {self.file})."
                )
            if not reported:
                reported = True
                bound = "" if here else f", or for {SILENCE_SECONDS:g} s without a sign of it"
                line = f"waiting for the end of {who}, which uses {self._what}{bound}"
                print(line, file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
        self._tidy()

    def _tidy(self) -> None:
        """Remove the files of processes that were killed while they took part."""
        for path in self.file.parent.glob(f"{self.file.name}.*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _is_settled(self) -> bool:
        """Whether the lease is still ours after the others have had time to put theirs back."""
        time.sleep(SETTLE_SECONDS)
        return self._is_mine(_read(self.file))

    def _is_mine(self, data: bytes | None) -> bool:
        holder = _holder_of(data)
        return holder is not None and holder.token == self._me.token

    def _create(self) -> bool:
        """Make the lease, and its directory. Returns whether it is ours now."""
        folder = self.file.parent
        if not folder.is_dir():
            if folder.exists():
                raise UserError(f"{folder} is a file: give a directory.")
            missing = [folder]
            while not missing[-1].parent.exists():
                missing.append(missing[-1].parent)
            self._made = missing
            folder.mkdir(parents=True, exist_ok=True)
        # A network file system may have made the link and lost its own answer.
        return self._publish(self._text()) or self._is_mine(_read(self.file))

    def _publish(self, data: bytes) -> bool:
        """Make the file with this content. Returns False if there is one already."""
        draft = self._unique_name()
        try:
            _write_new(draft, data)
            _link(draft, self.file, data)
        except (FileExistsError, FileNotFoundError):
            return False  # not found: the folder has just been removed, or the holder has tidied up
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()
        return True

    def _take_away(self, is_meant: Callable[[bytes], bool]) -> None:
        """Remove the lease if its content is the one that is meant."""
        aside = self._unique_name()
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

    def _fate(self) -> str | None:
        """How the lease was lost; None while it is ours."""
        try:
            # A missing file was taken aside by a process that will find that it is not the lease
            # that it had judged.
            if (found := _read(self.file)) is None and self._publish(self._text()):
                return None
            found = _read(self.file)
        except OSError:
            return None  # a file that cannot be read now cannot be written by others either
        if self._is_mine(found):
            return None
        if found is None:
            return "its directory has been removed"
        taker = _holder_of(found) or "another one"
        return f"it was suspended, and its place was taken by {taker}"

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            self.check()
            with self._changing, contextlib.suppress(OSError):
                if self._held:
                    self._move()

    def _move(self) -> None:
        """Advance the counter in the file itself, even if the lease was just renamed."""
        self._turn += 1
        handle = os.open(self.file, os.O_RDWR)
        try:
            if self._is_mine(os.read(handle, 4096)):
                os.pwrite(handle, self._text(), 0)
        finally:
            os.close(handle)

    def _text(self) -> bytes:
        """The content of the lease, of the same length for every turn."""
        return json.dumps({**self._me._asdict(), "turn": f"{self._turn:012}"}).encode() + b"\n"

    def _unique_name(self) -> Path:
        return self.file.with_name(f"{self.file.name}.{secrets.token_hex(8)}")

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()


class ObjectLease(Lease):
    """A lease on a store, whose every change is a write that succeeds only if nobody else wrote.

    It is released by a record that says so, never by a removal: a store may ignore the condition
    of a removal. The silence of a holder is judged as on other machines' disks.
    """

    file: store.ObjectPath

    def _create(self) -> bool:
        found = store.read_version(self.file)
        if found is not None and not _is_released(found[0]):
            return self._is_mine(found[0])  # a write whose answer was lost
        version = found[1] if found else store.ABSENT
        return store.write_if(self.file, self._text(), version) or self._is_mine(_read(self.file))

    def _publish(self, data: bytes) -> bool:
        return self._create()

    def _take_away(self, is_meant: Callable[[bytes], bool]) -> None:
        found = store.read_version(self.file)
        if found is not None and is_meant(found[0]):
            store.write_if(self.file, _RELEASED + secrets.token_hex(8).encode(), found[1])

    def _move(self) -> None:
        self._turn += 1
        found = store.read_version(self.file)
        if found is not None and self._is_mine(found[0]):
            store.write_if(self.file, self._text(), found[1])

    def _is_settled(self) -> bool:
        return True

    def _tidy(self) -> None:
        """Nothing is left by those who did not succeed."""


# What a released lease begins with on a store; what follows makes it unlike the one before.
_RELEASED = b"released "


def _is_released(data: bytes) -> bool:
    return data.startswith(_RELEASED)


def holders(files: Iterable[Path], patience: float) -> dict[Path, Holder]:
    """The holders of those leases that are held. Nothing is changed.

    A holder on another machine counts as alive if its lease changes within `patience` seconds; with
    0 it always does.
    """
    here = _machine()
    found: dict[Path, Holder] = {}
    silent: dict[Path, bytes] = {}
    for file in files:
        with contextlib.suppress(OSError):
            data = _read(file)
            if data is None or (holder := _holder_of(data)) is None:
                continue
            if holder.machine != here and patience > 0:
                silent[file] = data
            elif holder.machine != here or _is_alive(holder):
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


# Leases belong to the process, as a lock of the operating system does, whichever function asked.
_leases: dict[Path, Lease] = {}


def acquire(
    file: str | os.PathLike[str],
    what: str,
    *,
    waits: bool = False,
    lost: Callable[[str], object] | None = None,
) -> None:
    """Hold a lease until the surrounding `scope` ends. Does nothing if it is held already.

    Raises UserError as `Lease`.
    """
    path = store.place(file).resolve()
    if path not in _leases:
        kind = ObjectLease if store.is_object(path) else Lease
        _leases[path] = kind(path, what, waits=waits, lost=lost)


def check_held() -> None:
    """Check every lease of this process, before writing what two processes must not write."""
    for lease in list(_leases.values()):
        lease.check()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Release at the end what was acquired within. Also a decorator."""
    before = set(_leases)
    try:
        yield
    finally:
        for path in _leases.keys() - before:
            _leases.pop(path).release()


def end_process(line: str) -> NoReturn:
    """Print an error and exit with status 1 at once, so that no thread writes anything more."""
    # One write, because others may write to stderr at the same moment.
    sys.stderr.write(f"error: {one_line(line)}\n")
    sys.stderr.flush()
    os._exit(1)


def _link(source: Path, target: Path, data: bytes) -> None:
    """Give `source`, which holds `data`, a second name. Raises FileExistsError."""
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
    """The content of a lease; None if it does not exist, or was released on a store."""
    try:
        data = store.read_start(path, 4096)
        return None if store.is_object(path) and _is_released(data) else data
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise


def _holder_of(data: bytes | None) -> Holder | None:
    """The holder that a lease names; None for a damaged one."""
    try:
        fields = json.loads(data or b"")
        holder = Holder(**{key: fields[key] for key in Holder._fields})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = [value for value in holder if isinstance(value, str)]
    pid = holder.pid
    sound = type(pid) is int and 0 < pid < 2**31 and len(texts) == len(holder) - 1
    return holder if sound else None


def _is_alive(holder: Holder) -> bool:
    """Whether a holder on this machine still runs."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    began = _began(holder.pid)
    return began is not None and (not began or not holder.began or began == holder.began)


def _began(pid: int) -> str | None:
    """The start time of a process in the system's own units; '' if it is hidden.

    None for a process that has ended and waits for its parent to notice.
    """
    try:
        if sys.platform == "linux":
            # proc(5): the name, in brackets, may hold anything; then the state, field 3.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2]
            state, began = fields.split()[0], fields.split()[19]
        else:
            listed = subprocess.run(
                ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            )
            state, _, began = listed.stdout.strip().partition(" ")
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""
    return None if state[:1] in ("Z", "X") else began.strip()


def _machine() -> str:
    """The place where a process number is unique: host, boot and process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = space = ""
    return " ".join((socket.gethostname(), boot, space)).strip()
