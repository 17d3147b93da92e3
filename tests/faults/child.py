"""A command of ditjax, watched: `python -m tests.faults.child COMMAND --FLAG...`

Training writes an fsync'd line of JSON a step to $FAULTS_ORACLE: the step, its loss as hex, SHA-256
of the state and of its weights (all but the step), the ids of the batch's examples; first a line
for the state that training starts from; {"compiled": ...} for whatever XLA is asked for.

$FAULTS_PACE: seconds before each step, so that a kill finds one; $FAULTS_HOLD=STEP:SECONDS: before
that step. $FAULTS_NAN: ids of examples whose images are all NaN.
"""

import hashlib
import importlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from ditjax import cli, train
from ditjax.training import program
from ditjax.training.program import Training
from tests.commands.pair import keep_what_every_process_compiles


class Oracle:
    """What is known of a run from its own lips, durable before the next step begins."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, **values: Any) -> None:
        """One line."""
        os.write(self._file, json.dumps(values).encode() + b"\n")
        os.fsync(self._file)


def digest(tree: Any) -> str:
    """SHA-256 of every leaf, the same on every mesh of one process; of several, of what is here."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.update(jax.tree_util.keystr(path).encode())
        if leaf.is_fully_addressable:
            parts = {"": leaf}
        else:
            parts = {str(shard.index): shard.data for shard in leaf.addressable_shards}
        for index in sorted(parts):
            value = np.ascontiguousarray(parts[index])
            found.update(f"{index}{value.dtype}{value.shape}".encode())
            found.update(value.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def poisoned(local: Mapping[str, np.ndarray], bad: set[int]) -> dict[str, np.ndarray]:
    """The batch with NaN for the images of `bad` examples."""
    rows = np.isin(local["index"], list(bad))
    image = np.where(rows[:, None, None, None], np.float32(np.nan), local["image"])
    return {**local, "image": image}


def watch(oracle: Oracle, pace: float, hold: dict[int, float], bad: set[int]) -> None:
    """From here on whatever trains tells its steps."""
    real = program.training

    def training(*args: Any, **kwargs: Any) -> Training:
        p = real(*args, **kwargs)
        ahead: deque[list[int]] = deque()  # ids of the batches that are put, not yet stepped on
        started = False

        def put(local: Mapping[str, np.ndarray]) -> Any:
            ahead.append(local["index"].tolist())
            return p.put(poisoned(local, bad) if bad else local)

        def step(state: Any, *rest: Any) -> Any:
            nonlocal started
            if not started:
                oracle.write(start=int(state.step), state=digest(state))
                started = True
            time.sleep(hold.get(int(state.step) + 1, pace))
            new, metrics = p.step(state, *rest)
            weights = digest((new.params, new.ema, new.opt_state))
            oracle.write(
                step=int(new.step),
                loss=float(metrics["loss"]).hex(),
                state=digest(new),
                weights=weights,
                ids=ahead.popleft(),
            )
            return new, metrics

        return p._replace(put=put, step=step)

    setattr(train, "training", training)  # noqa: B010 (a function, to mypy)

    def heard(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile"):
            oracle.write(compiled=event)

    jax.monitoring.register_event_duration_secs_listener(heard)


def main(words: list[str]) -> NoReturn:
    """Runs the command as `python -m ditjax.COMMAND` would, and exits as it does."""
    command, *flags = words
    module = importlib.import_module(f"ditjax.{command}")
    if row := os.environ.get("FAULTS_BREAK"):
        from tests.faults import breaking

        breaking.broken(row)
    keep_what_every_process_compiles()
    if path := os.environ.get("FAULTS_ORACLE"):
        bad = {int(word) for word in os.environ.get("FAULTS_NAN", "").split(",") if word}
        held, _, seconds = os.environ.get("FAULTS_HOLD", "0:0").partition(":")
        hold = {int(held): float(seconds)}
        watch(Oracle(path), float(os.environ.get("FAULTS_PACE", "0")), hold, bad)
    sys.argv = [f"ditjax.{command}", *flags]
    cli.run(module.main)


if __name__ == "__main__":
    main(sys.argv[1:])
