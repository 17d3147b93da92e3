"""What the places in a recipe hold, so that a run is known by it and resumes wherever it lies.

A run keeps beside its recipe what its data set and its autoencoder were at the first start.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditjax.config import Config
from ditjax.data import source
from ditjax.data.folders import report_reading
from ditjax.errors import UserError
from ditjax.files.atomic import load_json, write_json
from ditjax.runs import rundir

DATA, AUTOENCODER = "data.name", "autoencoder.path"  # keys whose values are places
# name -> place
FROZEN = {"autoencoder": AUTOENCODER, "lm": "lm.path", "first": "given.first"}
FROZEN |= {"image_clip": "unclip.clip"}


def data_contents(c: Config) -> dict[str, str]:
    """{key: what identifies the content of the recipe's data set}; the data set is prepared."""
    found = source.known_content(c.data.name, c.data.data_dir or None)
    return {DATA: found} if found else {}


def read_contents(folder: Path) -> dict[str, str]:
    """What a run, or the first run of a study that has begun, recorded; {} if none did.

    A line names a record that is damaged.
    """
    runs = sorted(folder.glob(f"{rundir.RUNS}/*/{rundir.CONTENTS_FILE}"))
    for path in (folder / rundir.CONTENTS_FILE, *runs):
        try:
            found = load_json(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            found = None
        if isinstance(found, dict):
            return found
        report_reading(f"warning: {path} is damaged: what the run began with is not compared")
    return {}


def check_contents(folder: Path, contents: Mapping[str, str]) -> None:
    """Raise UserError if a run began with other content than its recipe's places hold now."""
    for key, before in read_contents(folder).items():
        now = contents.get(key, before)
        if now != before:
            raise UserError(
                f"{folder} holds a run whose config.{key} held {before!r}, and it holds {now!r}"
                " now: restore what was there, or give another --workdir."
            )


def record_contents(folder: Path, contents: Mapping[str, str]) -> None:
    """Record contents that the run in a directory has not recorded yet."""
    before = read_contents(folder)
    if contents.keys() - before.keys():
        write_json(folder / rundir.CONTENTS_FILE, {**contents, **before})


def same_content(
    folder: Path, contents: Mapping[str, str], data_dir: str = ""
) -> "rundir.SameContent":
    """Whether two values of a key are places of the same content: (key, before, now) -> bool.

    `contents` are those of the places now; `folder` holds what was recorded.
    """

    def same(key: str, before: Any, now: Any) -> bool:
        if key not in {DATA, AUTOENCODER, *contents} or not (before and now):
            return False
        ours, theirs = contents.get(key), read_contents(folder).get(key)
        if key == DATA:
            ours = ours or source.known_content(now, data_dir or None)
            theirs = theirs or source.known_content(before, data_dir or None)
        elif key == AUTOENCODER and os.path.realpath(before) == os.path.realpath(now):
            return True
        if ours is None or ours != theirs:
            return False
        report_reading(f"{folder}: config.{key} was {before!r} and is {now!r}: the same content")
        return True

    return same
