"""A run's directory and its recipe: how "the same command again" is told from another."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ditjax.config import completed, is_free, migrated, schema_of
from ditjax.errors import UserError
from ditjax.files.atomic import json_text, load_json, recordable, write_atomic

RECIPE_FILE = "config.json"
STUDY_FILE = "sweep.json"
CHECKPOINTS = "checkpoints"
RUNS = "runs"  # of a study: the folder of its cells
LOG_FILE = "log.txt"  # what a cell of a sweep prints
ENDED_FILE = "ended.json"  # how it ended, where it has no result

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def legal_name(text: str, longest: int = 128) -> str:
    """A text as the name of a directory or file: ASCII letters, digits and '._-', no dot in front.

    Where it is longer it ends in a hash of all of it.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    if not re.match("[A-Za-z0-9]", name):
        name = f"x{name}"
    if len(name) > longest:
        name = f"{name[: longest - 13]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return name


def inside(root: str | os.PathLike[str], name: str) -> Path:
    """root/name, the directory of a run. Raises UserError for a name or a link that leads out."""
    folder = Path(root) / name
    if not _NAME.fullmatch(name):
        raise UserError(
            f"run name {name[:140]!r}: expected 1 to 128 ASCII letters, digits and '._-', a letter"
            " or digit first."
        )
    if folder.resolve().parent != Path(root).resolve():
        raise UserError(
            f"{folder} is a link to {folder.resolve()}, out of {root}: remove it, or give another"
            " --workdir."
        )
    return folder


def open_run(
    workdir: str | os.PathLike[str],
    recipe: Mapping[str, Any],
) -> Path:
    """Makes the directory and writes its recipe, or checks that it is the same run.

    A recipe that was refused before its run began makes room for another. Raises UserError when
    the directory cannot be written, or holds a run of another recipe.
    """
    folder = Path(workdir)
    path = folder / RECIPE_FILE
    if path.exists() and _has_begun(folder):
        check_same(folder, read_recipe(folder), recipe)
        return folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file: give a directory.")
    write_atomic(path, _text(recipe))
    return folder


def _has_begun(folder: Path) -> bool:
    """Whether more is in a directory than a recipe, what a sweep says of it, and no checkpoint."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        names.discard(CHECKPOINTS)
    return bool(names - {RECIPE_FILE, LOG_FILE, ENDED_FILE})


def open_study(
    workdir: str | os.PathLike[str], recipe: Mapping[str, Any], cells: Mapping[str, Any]
) -> Path:
    """Makes a sweep's directory and records its recipe and cells: both may grow from call to call.

    Raises UserError when the directory cannot be written or is a single run's.
    """
    folder = Path(workdir)
    if (folder / CHECKPOINTS).exists():
        raise UserError(f"--workdir={folder} is a single run's: give a study its own directory.")
    for name, value in ((RECIPE_FILE, recipe), (STUDY_FILE, cells)):
        text = _text(value)
        # Many processes of one study say the same: the first has written it.
        with contextlib.suppress(OSError):
            if (folder / name).read_bytes() == text:
                continue
        write_atomic(folder / name, text)
    return folder


def _text(recipe: Mapping[str, Any]) -> bytes:
    return json_text(recipe).encode()


def tidy(workdir: str | os.PathLike[str]) -> None:
    """Removes what a process that died while writing left in a run's directory (`results.atomic`).

    By its one owner.
    """
    for pattern in (".*.tmp", "*/.*.tmp"):
        for path in Path(workdir).glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()


def is_run(workdir: str | os.PathLike[str]) -> bool:
    """Whether a directory is a run's: a model folder of diffusers has a config.json too."""
    # Not Path.exists, which raises for a name that is too long.
    return all(os.path.exists(Path(workdir) / name) for name in (RECIPE_FILE, CHECKPOINTS))


def read_recipe(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe that a run was started with. Raises UserError when there is none."""
    path = Path(workdir) / RECIPE_FILE
    try:
        recipe = load_json(path)
    except OSError as error:
        raise UserError(
            f"{workdir} is no run directory: cannot read {path.name} ({error.strerror})."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. Restore it, or remove the run.") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is damaged: it holds no recipe.")
    return recipe


def check_same(
    folder: Path, recorded: Mapping[str, Any], recipe: Mapping[str, Any], also: Sequence[str] = ()
) -> None:
    """Raises UserError when the run in a directory was started with another recipe.

    `also` are free keys that count, too.
    """
    for key, before, now in differences(recorded, recipe, also):
        raise UserError(
            f"{folder} holds a run with {key}={before!r}, this command says"
            f" {now!r}: give another --workdir, or the recipe it was started with."
        )


def differences(
    recorded: Mapping[str, Any], recipe: Mapping[str, Any], also: Sequence[str] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """(key, recorded value, asked value) where two recipes learn another thing.

    `recorded` may be of an older version. None stands for a key that one does not have; `also` are
    free keys that count, too.
    """
    schema = schema_of(recipe)
    started = dict(leaves(json.loads(json.dumps(migrated(recorded)))))
    # As it would be recorded.
    asked = dict(leaves(recordable(completed(recipe))))
    # Of two tasks no other key says more.
    for key in sorted(started.keys() | asked.keys(), key=lambda key: (key != "task", key)):
        if started.get(key) != asked.get(key) and (key in also or not is_free(schema, key)):
            yield key, started.get(key), asked.get(key)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('a.b', value) for every leaf of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
