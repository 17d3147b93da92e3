"""Which steps of a folder of checkpoints are whole, and how one is removed or set aside.

On a disk, orbax writes a step beside its place and renames it: a number is a whole step. A store
has no rename: there orbax writes in place and adds a marker last, so that a step counts only with
its marker. Whatever removes a step removes the marker first.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ditjax.errors import UserError
from ditjax.files import store
from ditjax.files.atomic import sync_folder, write_json

_UNFINISHED = ".orbax-checkpoint-tmp"  # orbax's suffix of a step that is being written
_DELETED = ".deleted"  # our suffix of a step that is being removed
_ASIDE = "damaged-"  # prefix of a step that is not what was saved
_MARKER = "commit_success.txt"  # orbax's, written last
_DAMAGED = "damaged.json"  # ours, in a step without a marker that was not what was saved
_NUMBER = re.compile("0|[1-9][0-9]*")


class Folders:
    """The steps in a folder on a disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def tidy(self) -> None:
        """Remove what a dead writer left. The caller must be the only writer."""
        for path in self._directory.iterdir():
            if _UNFINISHED in path.name or path.name.endswith(_DELETED):
                shutil.rmtree(path, ignore_errors=True)

    def numbers(self) -> list[int]:
        """All whole steps in ascending order."""
        with os.scandir(self._directory) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
        return sorted(int(name) for name in names if _NUMBER.fullmatch(name))

    def is_whole(self, step: int) -> bool:
        """Whether a step is there."""
        return (self._directory / str(step)).exists()

    def sync(self, step: int) -> None:
        """Make a step durable before it is renamed."""
        for folder in self._directory.glob(f"{step}{_UNFINISHED}*"):
            for inner, _, _ in os.walk(folder):
                _sync_files(Path(inner))

    def settle(self, step: int) -> None:
        """Make the name of a step durable."""
        _sync_files(self._directory / str(step))
        sync_folder(self._directory)

    def remove(self, step: int) -> Callable[[], None]:
        """Make a step count no more; what this returns removes it. Raises OSError."""
        # Renamed first, so that a half-removed checkpoint is not taken for a step.
        gone = self._directory / f"{step}{_DELETED}"
        (self._directory / str(step)).rename(gone)
        return lambda: shutil.rmtree(gone, ignore_errors=True)

    def set_aside(self, step: int, what: str) -> str | None:
        """Make a damaged step count no more, and return in words what was done.

        None if another process did it first.
        """
        name = f"{_ASIDE}{step}"
        for k in range(1, 1000):
            if not (self._directory / name).exists():
                break
            name = f"{_ASIDE}{step}-{k}"
        with contextlib.suppress(FileNotFoundError):
            (self._directory / str(step)).rename(self._directory / name)
            sync_folder(self._directory)
            return f"It was renamed to {name}"
        return None

    def damaged(self) -> list[str]:
        """The names of the steps that were set aside."""
        return sorted(path.name for path in self._directory.glob(f"{_ASIDE}*"))


class Objects:
    """The steps below a name on a store. The methods are those of `Folders`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def tidy(self) -> None:
        for step in self._marked(_MARKER, False):
            if not self._has(step, _DAMAGED):
                store.remove_tree(self._directory / str(step), ignore_errors=True)

    def numbers(self) -> list[int]:
        return self._marked(_MARKER, True)

    def is_whole(self, step: int) -> bool:
        return self._has(step, _MARKER)

    def sync(self, step: int) -> None:
        """Nothing: a put that returned is durable."""

    def settle(self, step: int) -> None:
        """Nothing."""

    def remove(self, step: int) -> Callable[[], None]:
        folder = self._directory / str(step)
        (folder / _MARKER).unlink(missing_ok=True)
        return lambda: store.remove_tree(folder, ignore_errors=True)

    def set_aside(self, step: int, what: str) -> str | None:
        folder = self._directory / str(step)
        if not self.is_whole(step):
            return None
        write_json(folder / _DAMAGED, {"step": step, "what": what})
        (folder / _MARKER).unlink(missing_ok=True)
        return f"It counts no more: {_MARKER} was removed, and {_DAMAGED} written"

    def damaged(self) -> list[str]:
        return [str(step) for step in self._marked(_DAMAGED, True)]

    def _has(self, step: int, name: str) -> bool:
        return (self._directory / str(step) / name).is_file()

    def _marked(self, name: str, marked: bool) -> list[int]:
        """The numbers of the steps that have an object of a name, or have it not."""
        names = [path.name for path in self._directory.iterdir()]
        steps = sorted(int(name) for name in names if _NUMBER.fullmatch(name))
        with ThreadPoolExecutor(store.THREADS) as pool:
            found = list(pool.map(lambda step: self._has(step, name), steps))
        return [step for step, has in zip(steps, found, strict=True) if has == marked]


def check_can_hold(directory: Path) -> None:
    """Raise UserError for a place where orbax can neither write nor read checkpoints."""
    if isinstance(directory, store.ObjectPath) and directory.scheme != "gs":
        raise UserError(
            f"{directory}: orbax writes checkpoints to disks and to gs://, not to"
            f" {directory.scheme}://: give another --workdir. Files and data may be"
            " there."
        )


def steps_in(directory: Path) -> Folders | Objects:
    """The steps in a folder of checkpoints, wherever it is."""
    return Objects(directory) if store.is_object(directory) else Folders(directory)


def _sync_files(folder: Path) -> None:
    """Make the files of a folder and their names durable."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
