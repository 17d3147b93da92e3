"""A run's directory and its recipe, and whether a command resumes the run in a directory."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ditjax.config import (
    check_recorded,
    completed,
    fixed_keys,
    is_free,
    merged,
    migrated,
    schema_of,
)
from ditjax.errors import UserError
from ditjax.files import faults
from ditjax.files.atomic import (
    json_text,
    load_json,
    read_json,
    recordable,
    write_atomic,
    write_json,
)
from ditjax.files.store import is_object, place, present

RECIPE_FILE = "config.json"
CONTENTS_FILE = "contents.json"  # what the places in the recipe held (`runs/contents.py`)
CLASSES_FILE = "classes.json"  # the names of the classes, by number
START_FILE = "start.json"  # what the parameters were before the first step, if not initial ones
STUDY_FILE = "sweep.json"
CHECKPOINTS = "checkpoints"
AVERAGES = "averages"  # snapshots of the power-function averages
RUNS = "runs"  # the folder of a study's cells
LOG_FILE = "log.txt"  # the output of a cell of a sweep
ENDED_FILE = "ended.json"  # the reason that a cell ended without a result

# (key, recorded value, requested value) -> whether both are places of the same content
SameContent = Callable[[str, Any, Any], bool]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def legal_name(text: str, longest: int = 128) -> str:
    """Turn a text into a file name of ASCII letters, digits and '._-' that starts with no dot.

    A name longer than `longest` is cut and ends in a hash of the whole text.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    if not re.match("[A-Za-z0-9]", name):
        name = f"x{name}"
    if len(name) > longest:
        name = f"{name[: longest - 13]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return name


def inside(root: str | os.PathLike[str], name: str) -> Path:
    """root/name, the directory of a run. Raises UserError if a name or link leads out of root."""
    folder = place(root) / name
    if not _NAME.fullmatch(name):
        raise UserError(
            f"run name {name[:140]!r}: expected 1 to 128 ASCII letters, digits and '._-', starting"
            " with a letter or digit."
        )
    if folder.resolve().parent != place(root).resolve():
        raise UserError(
            f"{folder} is a link to {folder.resolve()}, outside of {root}: remove it, or give"
            " another --workdir."
        )
    return folder


def open_directory(
    workdir: str | os.PathLike[str],
    recipe: Mapping[str, Any],
    same: SameContent | None = None,
    classes: Sequence[str] = (),
) -> Path:
    """Create a run's directory with its recipe, or check that it holds a run of the same recipe.

    `classes` are the names of the data set's classes, by number. They are recorded beside the
    recipe. The recipe of a run that has not started is overwritten. Raises UserError if the
    directory cannot be written, or holds a run of another recipe or of other classes.
    """
    folder = place(workdir)
    path = folder / RECIPE_FILE
    if has_begun(folder):
        recorded = read_recipe(folder)
        check_same(folder, recorded, recipe, same=same)
        if _extends(_flat(migrated(recorded)), _flat(completed(recipe))):
            changes = {name: {key: recipe[name][key]} for name, key in _SCHEDULE}
            write_atomic(path, _text(merged(migrated(recorded), changes)))
        there = read_classes(folder)
        if classes and there is None:  # an older ditjax began the run
            write_json(folder / CLASSES_FILE, {"classes": classes})
        elif classes:
            _check_classes(folder, there, recordable(classes))
        return folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file: give a directory.")
    (folder / CONTENTS_FILE).unlink(missing_ok=True)  # of a recipe that did not begin
    write_atomic(path, _text(recipe))
    if classes:
        write_json(folder / CLASSES_FILE, {"classes": classes})
    return folder


def read_classes(workdir: str | os.PathLike[str]) -> list[str] | None:
    """The names of the classes that a run learns, by number; None if they are not recorded.

    Raises UserError for a damaged file.
    """
    path = place(workdir) / CLASSES_FILE
    if not faults.exists(path):
        return None
    names = read_json(path, "restore it, or remove it and use class numbers").get("classes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is damaged: it holds no list of names.")
    return names


def _check_classes(folder: Path, recorded: list[str] | None, classes: list[str]) -> None:
    """Raise UserError if a class number would mean another class than before."""
    for k, (before, now) in enumerate(zip_longest(recorded or [], classes)):
        if before != now:
            raise UserError(
                f"{folder} holds a run whose class {k} is {before!r}, but class {k} of the data"
                f" set is {now!r}: give another --workdir, or the classes that the run was started"
                f" with ({folder / CLASSES_FILE})."
            )


def has_begun(folder: Path) -> bool:
    """Whether a directory has a recipe, and more than it and a sweep's files but no checkpoint."""
    if not faults.exists(folder / RECIPE_FILE):
        return False
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    for name in (CHECKPOINTS, AVERAGES):
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            names.discard(name)
    return bool(names - {RECIPE_FILE, CONTENTS_FILE, CLASSES_FILE, LOG_FILE, ENDED_FILE})


def open_study(
    workdir: str | os.PathLike[str], recipe: Mapping[str, Any], cells: Mapping[str, Any]
) -> Path:
    """Create a sweep's directory and record its recipe and cells, which later calls may change.

    Raises UserError if the directory cannot be written or belongs to a single run.
    """
    folder = place(workdir)
    if (folder / CHECKPOINTS).exists():
        raise UserError(
            f"--workdir={folder} holds a single run: use another directory for the study."
        )
    for name, value in ((RECIPE_FILE, recipe), (STUDY_FILE, cells)):
        text = _text(value)
        # The processes of a study write the same content: the first one has written it.
        with contextlib.suppress(OSError):
            if (folder / name).read_bytes() == text:
                continue
        write_atomic(folder / name, text)
    return folder


def _text(recipe: Mapping[str, Any]) -> bytes:
    return json_text(recipe).encode()


def tidy(workdir: str | os.PathLike[str]) -> None:
    """Remove the temporary files of interrupted writes (`files/atomic.py`) from a run's directory.

    Only the holder of the lease may call it. On a store there are none.
    """
    folder = place(workdir)
    if is_object(folder):
        return
    for pattern in (".*.tmp", "*/.*.tmp"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()


def is_run(workdir: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a run; a model folder of diffusers has a config.json too."""
    return all(present(place(workdir) / name) for name in (RECIPE_FILE, CHECKPOINTS))


def read_recipe(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe that a run was started with. Raises UserError if there is none.

    A line names the modules that it will import (`config.check_recorded`).
    """
    path = place(workdir) / RECIPE_FILE
    try:
        recipe = load_json(path)
    except OSError as error:
        raise UserError(
            f"{workdir} is not a run directory: cannot read {path.name} ({error.strerror})."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. Restore it, or remove the run.") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is damaged: it holds no recipe.")
    check_recorded(recipe, str(path))
    return recipe


def check_same(
    folder: Path,
    recorded: Mapping[str, Any],
    recipe: Mapping[str, Any],
    also: Sequence[str] = (),
    same: SameContent | None = None,
) -> None:
    """Raise UserError if the run in a directory was started with another recipe.

    `also` are free keys that are compared, too. Places of the `same` content do not differ.
    """
    for key, before, now in differences(recorded, recipe, also):
        if same and same(key, before, now):
            continue
        by = fixed_keys(recipe).get(key)
        raise UserError(
            f"{folder} holds a run with {key}={before!r}, but this command has {now!r}"
            f"{f', and {by} depends on it' if by else ''}: give another --workdir, or the recipe"
            f" that the run was started with{_how_to_extend(recorded, key)}."
        )


def _how_to_extend(recorded: Mapping[str, Any], key: str) -> str:
    """How a run whose schedule has an end is trained on, if a key concerns that."""
    if tuple(key.split(".")) not in _SCHEDULE or "train.steps" not in fixed_keys(recorded):
        return ""
    ends = "".join(f"{step}," for step in _schedule_ends(_flat(migrated(recorded))))
    return f"; to train on, add a schedule with --config.optim.restarts={ends}"


def differences(
    recorded: Mapping[str, Any], recipe: Mapping[str, Any], also: Sequence[str] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, recorded value, requested value) for keys that affect what is learned and differ.

    `recorded` may be of an older version. The value of a missing key is None. `also` are free keys
    that are compared, too. A schedule that begins where the recorded one ends is no difference.
    """
    started, requested = _flat(migrated(recorded)), _flat(completed(recipe))
    extends = _extends(started, requested)
    schema, fixed = schema_of(recipe), fixed_keys(recipe)
    # The task comes first: if it differs, it explains the other differences.
    for key in sorted(started.keys() | requested.keys(), key=lambda key: (key != "task", key)):
        if started.get(key) == requested.get(key):
            continue
        may_change = is_free(schema, key) and key not in fixed
        may_change = may_change or (extends and tuple(key.split(".")) in _SCHEDULE)
        if key in also or not may_change:
            yield key, started.get(key), requested.get(key)


_SCHEDULE = (("train", "steps"), ("optim", "restarts"))


def _schedule_ends(flat: Mapping[str, Any]) -> list[Any]:
    """The steps at which the schedules of a recipe's learning rate end, in order."""
    restarts = flat.get("optim.restarts")
    return [*(restarts if isinstance(restarts, list) else ()), flat.get("train.steps")]


def _extends(recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> bool:
    """Whether a recipe adds a schedule of the learning rate after those of the recorded one."""
    before, now = _schedule_ends(recorded), _schedule_ends(requested)
    return len(now) > len(before) and now[: len(before)] == before


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a recipe with its value as it is recorded."""
    return dict(leaves(recordable(recipe)))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ('a.b', value) for every leaf of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
