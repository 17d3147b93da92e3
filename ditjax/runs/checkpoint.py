"""Checkpoints: the training state in orbax's format, the position in the data, and digests.

DIRECTORY/STEP holds `state` (orbax), `position` (of the data), `metrics` if the step was evaluated,
and `digests` of every leaf and of the other two items. `runs/steps.py` says which steps are whole.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from etils import epath

from ditjax.errors import FaultError, UserError, first_few, one_line, reason
from ditjax.files import digests, faults, store
from ditjax.files.atomic import protocol_hash
from ditjax.parallel.processes import is_primary
from ditjax.runs.steps import check_can_hold, steps_in

Step = int | Literal["latest", "best"]


class Score(NamedTuple):
    """The score of a checkpoint: a named distance, lower is better, and how it was measured."""

    name: str
    value: float
    protocol: Mapping[str, Any]


class DamagedError(UserError):
    """A checkpoint does not hold what was saved. `what` names the leaf or the file.

    With `everywhere`, every process finds the damage; otherwise perhaps this one alone.
    """

    def __init__(self, line: str, step: int, what: str, *, everywhere: bool) -> None:
        super().__init__(line)
        self.step, self.what, self.everywhere = step, what, everywhere


_STATE, _POSITION, _METRICS, _DIGESTS = "state", "position", "metrics", "digests"
_FULL = re.compile("no space left on device|disk quota exceeded|file too large", re.IGNORECASE)


def _best_of_each(scored: Mapping[int, Mapping[str, Any] | None]) -> dict[str, int]:
    """Metrics by step -> the best step of each protocol, the newest of equal ones."""
    best: dict[str, int] = {}
    values: dict[str, float] = {}
    for step in sorted(scored):
        if metrics := scored[step]:
            by = metrics["protocol_hash"]
            if metrics["value"] <= values.get(by, math.inf):
                best[by], values[by] = step, metrics["value"]
    return best


class Checkpoints:
    """The checkpoints of one run directory: the newest `keep`, the best, and those at intervals.

    `keep_every` also keeps the steps that it divides; 0 keeps none. `save` returns before the bytes
    are durable; they are durable after `wait`, or when the context is left. A writer must be alone
    in the directory; it removes what a dead writer left unfinished. `noun` is what errors call one.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int,
        *,
        keep_every: int = 0,
        read_only: bool = False,
        noun: str = "checkpoint",
    ) -> None:
        # Orbax fails on relative paths, and only when it writes in the background.
        self.directory = store.place(directory).resolve()
        check_can_hold(self.directory)
        self._steps = steps_in(self.directory)
        try:
            if not read_only:
                self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.directory}: {error.strerror}.") from None
        if read_only and not self.directory.is_dir():
            raise UserError(f"{self.directory} does not exist: train first, or name another run.")
        self._keep, self._keep_every, self._noun = keep, keep_every, noun
        self._writing: int | None = None  # the step that is being written in the background
        self._saved: int | None = None  # the last step given to `save`
        # Metrics of the steps whose metrics have been read.
        self._known: dict[int, Mapping[str, Any] | None] = {}
        self._removers: list[threading.Thread] = []
        # Not orbax's CheckpointManager, which lists a step before it is written, reports a failure
        # only at the next save, and deletes old steps before the new one is durable.
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(async_options=_options())
            ),
            async_options=_options(self._sync),
        )
        if not read_only and is_primary():
            self._steps.tidy()

    @property
    def steps(self) -> list[int]:
        """All complete checkpoints in ascending order, without unfinished ones."""
        return faults.retried(self.directory, self._steps.numbers)

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The best step by the newest protocol; None if no step was evaluated."""
        self.wait()
        return max(_best_of_each(self._scores(self.steps)).values(), default=None)

    @property
    def damaged(self) -> list[str]:
        """The names of the damaged checkpoints that were set aside."""
        return self._steps.damaged()

    def save(
        self, step: int, state: Any, position: dict[str, Any], score: Score | None = None
    ) -> None:
        """Save the state and the data position of a step, in the background.

        A finite score makes it a candidate for the best. A step that was just saved is not saved
        again. Raises FaultError if this save or the previous one fails.
        """
        self.wait()
        if step == self._saved:
            return
        items = {_POSITION: _plain(position)}
        if score and math.isfinite(score.value):
            protocol = {"protocol_hash": protocol_hash(dict(score.protocol))}
            items[_METRICS] = _plain({**score._asdict(), **protocol})
        record = {
            "state": digests.tree_digests(state),
            "items": {name: _digest(item) for name, item in items.items()},
        }
        items[_DIGESTS] = {**record, "sha256": _digest(record)}
        self._writing = self._saved = step
        with self._save_faults(step):
            self._orbax.save(
                _orbax_path(self._folder(step)),
                args=ocp.args.Composite(
                    **{_STATE: ocp.args.StandardSave(_one_copy(_stored(state)))},
                    **{name: ocp.args.JsonSave(item) for name, item in items.items()},
                ),
                force=True,
            )

    def check(self) -> None:
        """Raise FaultError if the save in the background has failed, without waiting for it."""
        step = self._writing
        if step is None:
            return
        with self._save_faults(step):
            self._orbax.check_for_errors()
        if self._steps.is_whole(step):
            self.wait()

    def wait(self) -> None:
        """Wait until every save is durable, then remove superseded checkpoints.

        Raises FaultError if the save failed.
        """
        step = self._writing
        if step is None:
            return
        with self._save_faults(step):
            self._orbax.wait_until_finished()
            if is_primary():
                self._steps.settle(step)
        self._writing = None
        self._known.pop(step, None)
        if is_primary():
            self._remove_superseded()

    def restore(self, abstract_state: Any, step: Step = "latest") -> tuple[Any, dict[str, Any]]:
        """Read (state on the shardings of `abstract_state`, data position) of a step.

        Raises UserError if there is no such step, or its dtypes or shapes differ, DamagedError if
        it does not hold what was saved, and FaultError if the file system does not answer.
        """
        step = self.find(step)
        position, saved = self._record(step)
        self._check_types(step, saved, abstract_state)
        stored = _stored(abstract_state)
        args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(stored)})
        folder = _orbax_path(self._folder(step))
        state = self._read(step, lambda: self._orbax.restore(folder, args=args)[_STATE])
        if stored is not abstract_state:
            state = abstract_state._replace(**state)
        self._check(step, saved, state)
        if saved is None and is_primary():
            print(
                f"{self._noun} {step} in {self.directory} has no digests: an older ditjax wrote it."
                " It is used unchecked",
                file=sys.stderr,
            )
        return state, position

    def restore_part(self, part: str, abstract: Any, step: Step = "latest") -> tuple[Any, int]:
        """Read (one part of the state, such as 'ema', on the shardings of `abstract`; step).

        The part of a part is named 'averages/trees'. Raises as `restore`.
        """
        step = self.find(step)
        _, saved = self._record(step)
        names = part.split("/")
        target = functools.reduce(lambda tree, name: {name: tree}, reversed(names), abstract)
        self._check_types(step, saved, target, part)

        def read() -> Any:
            with ocp.PyTreeCheckpointer() as reader:
                return reader.restore(
                    _orbax_path(self._folder(step) / _STATE),
                    args=ocp.args.PyTreeRestore(
                        target,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                        partial_restore=True,
                    ),
                )

        restored = self._read(step, read)
        self._check(step, saved, restored)
        return functools.reduce(lambda tree, name: tree[name], names, restored), step

    def saved_with(self, step: int) -> tuple[dict[str, Any], str]:
        """(The position that was saved with a step, the SHA-256 of its digests).

        Raises DamagedError.
        """
        position, saved = self._record(step)
        return position, _digest(saved)

    def rewind(self, step: int) -> list[int]:
        """Remove the steps after `step`, the newest first, and return them. Raises FaultError."""
        later = [found for found in self.steps if found > step]
        try:
            for found in reversed(later):
                self._remove(found)
        except OSError as error:
            raise FaultError(f"cannot remove from {self.directory}: {reason(error)}.") from error
        return later

    def set_aside(self, error: DamagedError) -> None:
        """Set a damaged step aside, so that nothing takes it for a checkpoint."""
        self._known.pop(error.step, None)
        if done := self._steps.set_aside(error.step, error.what):
            print(
                f"warning: {self._noun} {error.step} in {self.directory} is damaged: {error.what}."
                f" {done}; the one before it is used",
                file=sys.stderr,
            )

    def find(self, step: Step) -> int:
        """The number of an existing step. Raises UserError."""
        self.wait()
        steps = self.steps
        if not steps:
            raise UserError(
                f"{self.directory} holds no {self._noun}: train first, with"
                " python -m ditjax.train --config=... --workdir=..."
            )
        found: Step | None = step
        if step == "latest":
            found = steps[-1]
        elif step == "best":
            found = self.best_step
        there = f"it has {', '.join(map(str, steps))}"
        if found is None:
            raise UserError(
                f"{self.directory} holds no best checkpoint, because none was evaluated"
                f" (config.train.evaluate_every_steps): {there}."
            )
        if found not in steps:
            raise UserError(f"{self.directory} holds no {self._noun} of step {step}: {there}.")
        return found

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _sync(self) -> None:
        """Sync a step. Orbax calls this in the background before it commits the step."""
        assert self._writing is not None
        self._steps.sync(self._writing)

    def _remove_superseded(self) -> None:
        try:
            steps = self.steps
            kept = {*steps[-self._keep :], *_best_of_each(self._scores(steps)).values()}
        except FaultError as error:  # it may hide the best one
            print(f"warning: no checkpoint is removed now: {one_line(error)}", file=sys.stderr)
            return
        if self._keep_every:
            kept |= {step for step in steps if step % self._keep_every == 0}
        for step in steps:
            if step not in kept:
                with contextlib.suppress(OSError):  # the next start removes it
                    self._remove(step)

    def _remove(self, step: int) -> None:
        remover = threading.Thread(target=self._steps.remove(step))
        remover.start()
        self._removers.append(remover)

    def _scores(self, steps: list[int]) -> dict[int, Mapping[str, Any] | None]:
        """The metrics of each step, None if they are missing, unreadable or changed."""
        for step in steps:
            if step in self._known:
                continue
            found = None
            if faults.exists(self._folder(step) / _METRICS):
                with contextlib.suppress(DamagedError):
                    metrics, saved = self._item(step, _METRICS), self._saved_digests(step)
                    if saved is None or saved["items"].get(_METRICS) == _digest(metrics):
                        found = metrics
            self._known[step] = found
        return {step: self._known[step] for step in steps}

    def _item(self, step: int, item: str) -> Any:
        """The value of a step's JSON item. Raises DamagedError."""
        folder = self._folder(step) / item
        # Orbax's CheckpointManager, which wrote older runs, gave the file of metrics this name.
        old = item == _METRICS and faults.exists(folder / item)
        path = folder / (item if old else "metadata")
        try:
            return json.loads(faults.retried(path, path.read_bytes).decode("utf-8"))
        except PermissionError as error:
            raise UserError(f"cannot read {path}: {error.strerror}.") from None
        except FileNotFoundError:
            what = "is missing"
        except (OSError, ValueError) as error:
            what = f"cannot be read ({reason(error)})"
        raise self._damage(step, f"{path.relative_to(self._folder(step))} {what}")

    def _saved_digests(self, step: int) -> Any:
        """The digests of a step, None for an older one without. Raises DamagedError."""
        if not faults.exists(self._folder(step) / _DIGESTS):
            return None
        record = self._item(step, _DIGESTS)
        if isinstance(record, dict):
            seal = record.pop("sha256", None)
            if seal == _digest(record):
                return record
        raise self._damage(step, f"{_DIGESTS}/metadata is not what was written")

    def _record(self, step: int) -> tuple[Any, dict[str, Any] | None]:
        """(data position, digests of the state or None). Raises DamagedError."""
        saved, position = self._saved_digests(step), self._item(step, _POSITION)
        if saved is None:
            return position, None
        if saved["items"][_POSITION] != _digest(position):
            raise self._damage(step, f"{_POSITION}/metadata is not what was written")
        return position, saved["state"]

    def _check_types(self, step: int, saved: Any, abstract: Any, part: str = "") -> None:
        """Raise UserError for a state of other leaves, dtypes or shapes, which orbax would cast."""
        if saved is None:
            saved = self._read(step, lambda: _types(self._folder(step) / _STATE))
        prefix = part and f"{part}/"
        saved = {path: leaf for path, leaf in saved.items() if path.startswith(prefix)}
        if found := digests.type_differences(saved, digests.leaf_types(abstract)):
            raise UserError(
                f"{self._noun} {step} in {self.directory} is of another network or optimizer:"
                f" {'; '.join(found)}. Give the recipe that it was trained with."
            )

    def _check(self, step: int, saved: Any, found: Any) -> None:
        """Raise DamagedError for leaves that differ from what was saved."""
        if saved is not None and (bad := digests.changed_leaves(saved, found)):
            what = f"{first_few(bad)} {'is' if len(bad) == 1 else 'are'} not what was saved"
            raise self._damage(step, what)

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        """Raise DamagedError for what orbax raises on a damaged file, FaultError for a fault."""
        # Several processes read together: one cannot start again alone.
        waits = None if jax.process_count() == 1 else ()
        try:
            return faults.retried(f"{self._noun} {step} in {self.directory}", read, waits)
        except (UserError, FaultError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            raise self._damage(step, reason(error), everywhere=False) from error

    def _damage(self, step: int, what: str, *, everywhere: bool = True) -> DamagedError:
        others = ", ".join(str(other) for other in self.steps if other != step)
        return DamagedError(
            f"{self._noun} {step} in {self.directory} is damaged: {what}."
            + (f" Name another --step: {others}." if others else " There is no other."),
            step,
            what,
            everywhere=everywhere,
        )

    @contextlib.contextmanager
    def _save_faults(self, step: int) -> Iterator[None]:
        """Raise FaultError for a failed save."""
        try:
            yield
        except (FaultError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            self._writing = None
            newest = self.latest_step
            begin = f"from step {newest}" if newest is not None else "from the beginning"
            full = _FULL.search(str(error))
            raise FaultError(
                f"{self._noun} {step} was not saved in {self.directory}:"
                f" {full[0] if full else reason(error)}. Older ones are kept;"
                f" {'free some space' if full else 'repair this'}, then run the same command again"
                f" to resume {begin}."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with contextlib.suppress(*() if kind is None else (Exception,)):
                self.wait()
        finally:
            with contextlib.suppress(Exception):  # a failed save has been reported
                self._orbax.close()
            for thread in self._removers:
                thread.join()


def _options(when_written: Callable[[], None] | None = None) -> ocp.AsyncOptions:
    """Folders are made before `save` returns, so that a failure is raised there."""
    return ocp.AsyncOptions(
        post_finalization_callback=when_written, create_directories_asynchronously=False
    )


def _stored(state: Any) -> Any:
    """A state without its fields that are (), as older ones are stored; in the same order."""
    fields = state._asdict() if hasattr(state, "_asdict") else {}
    empty = {name for name, value in fields.items() if type(value) is tuple and not value}
    if not empty:
        return state
    return OrderedDict((name, value) for name, value in fields.items() if name not in empty)


def _one_copy(state: Any) -> Any:
    """A state whose replicated leaves are on one device, without a copy.

    Of several replicas in a process, orbax would compile a slice of each leaf for every device.
    """
    if jax.process_count() > 1:  # they share the work of writing
        return state
    return jax.tree.map(
        lambda leaf: (
            leaf.addressable_data(0)
            if isinstance(leaf, jax.Array) and leaf.is_fully_replicated
            else leaf
        ),
        state,
    )


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, as it comes back from JSON."""
    return dict(json.loads(json.dumps(value)))


def _digest(value: Any) -> str:
    """SHA-256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _orbax_path(path: Path) -> epath.Path:
    """A path as orbax takes it: of a pathlib.Path it would take the local one of that name."""
    return epath.Path(os.fspath(path))


def _types(folder: Path) -> dict[str, list[Any]]:
    """Path of a leaf -> [dtype, shape], from orbax's metadata."""
    with ocp.PyTreeCheckpointer() as reader:
        return digests.leaf_types(reader.metadata(_orbax_path(folder)).item_metadata.tree)
