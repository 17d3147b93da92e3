"""Checkpoints by orbax: the training state, and beside it what a resume must agree on."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from ditjax.errors import UserError
from ditjax.io.results import protocol_hash

Step = int | Literal["latest", "best"]


class Score(NamedTuple):
    """What a checkpoint is worth: a named distance, lower is better, and how it was measured."""

    name: str
    value: float
    protocol: Mapping[str, Any]


class _Best:
    """Orbax policy: of the checkpoints scored by one protocol the best is kept.

    Orbax's own BestN would rank distances of different protocols, which a run resumed with other
    keys of config.evaluate has.
    """

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any = None) -> Sequence[bool]:
        best = set(_best_of_each({info.step: info.metrics for info in checkpoints}).values())
        return [info.step in best for info in checkpoints]


def _best_of_each(scored: Mapping[int, Mapping[str, Any] | None]) -> dict[str, int]:
    """Metrics by step -> the best step of each protocol; of equal ones the newest."""
    best: dict[str, int] = {}
    values: dict[str, float] = {}
    for step in sorted(scored):
        if metrics := scored[step]:
            by = metrics["protocol_hash"]
            if metrics["value"] <= values.get(by, math.inf):
                best[by], values[by] = step, metrics["value"]
    return best


class Checkpoints:
    """The checkpoints of one run directory: the newest `keep`, and the best that was evaluated.

    A context manager that waits for writes.

    `save` returns before the bytes are durable; leaving the context, or `wait`, means that they
    are.
    """

    def __init__(
        self, directory: str | os.PathLike[str], keep: int, *, read_only: bool = False
    ) -> None:
        # Orbax fails on relative paths, and only when it writes in the background.
        self.directory = Path(directory).resolve()
        try:
            if not read_only:
                self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.directory}: {error.strerror}.") from None
        if not self.directory.is_dir():
            raise UserError(f"{self.directory} does not exist: train first, or name another run.")
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(
                    [ocp.checkpoint_managers.LatestN(keep), _Best()]
                ),
                # Without it orbax does not write metrics; what is kept is the policy's matter.
                best_fn=lambda metrics: metrics["value"],
                best_mode="min",
                read_only=read_only,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint; writes that were cut off do not count."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The best by the protocol that was in force last; None where none was evaluated."""
        self.wait()
        best = _best_of_each({step: self._manager.metrics(step) for step in self.steps})
        return max(best.values(), default=None)

    @property
    def steps(self) -> list[int]:
        """All complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: Any, position: dict[str, Any], score: Score | None = None
    ) -> None:
        """Saves the state and the data position of a step, in the background.

        With a score it may become the best; one that is not finite is none.
        """
        metrics = None
        if score and math.isfinite(score.value):
            metrics = {**score._asdict(), "protocol_hash": protocol_hash(dict(score.protocol))}
        saved = self._manager.save(
            step,
            metrics=metrics,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
            ),
        )
        if not saved and step != self.latest_step:
            raise RuntimeError(f"orbax did not save step {step} in {self.directory}")

    def restore(self, abstract_state: Any, step: Step = "latest") -> tuple[Any, dict[str, Any]]:
        """(state on the shardings of `abstract_state`, data position) of a step.

        Raises UserError when there is none.
        """
        step = self.find(step)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), position=ocp.args.JsonRestore()
            ),
        )
        return restored.state, restored.position

    def restore_part(self, part: str, abstract: Any, step: Step = "latest") -> tuple[Any, int]:
        """(one field of the state, such as 'ema', on the shardings of `abstract`; step)."""
        step = self.find(step)
        path = self.directory / str(step) / "state"
        target = {part: abstract}
        with ocp.PyTreeCheckpointer() as reader:
            restored = reader.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )
        return restored[part], step

    def find(self, step: Step) -> int:
        """The number of a step that is there. Raises UserError."""
        self.wait()
        steps = self.steps
        if not steps:
            raise UserError(
                f"{self.directory} holds no checkpoint: train first, with"
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
                f"{self.directory} holds no best checkpoint, for none was evaluated"
                f" (config.train.evaluate_every_steps): {there}."
            )
        if found not in steps:
            raise UserError(f"{self.directory} holds no checkpoint of step {step}: {there}.")
        return found

    def wait(self) -> None:
        """Returns when every save so far is on disk; raises what a background write raised."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        self._manager.close()


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0
