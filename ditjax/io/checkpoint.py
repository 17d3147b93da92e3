"""Checkpoints by orbax: the training state, and beside it what a resume must agree on."""

import os
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from ditjax.errors import UserError


class Checkpoints:
    """The checkpoints of one run directory, newest kept; a context manager that waits for writes.

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
                preservation_policy=ocp.checkpoint_managers.LatestN(keep), read_only=read_only
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint; writes that were cut off do not count."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Saves the state and the data position of a step, in the background."""
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
            ),
        )
        if not saved and step != self.latest_step:
            raise RuntimeError(f"orbax did not save step {step} in {self.directory}")

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """(state on the shardings of `abstract_state`, data position) of a step, or of the newest.

        Raises UserError when there is none.
        """
        step = self._require(step)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), position=ocp.args.JsonRestore()
            ),
        )
        return restored.state, restored.position

    def restore_part(self, part: str, abstract: Any, step: int | None = None) -> tuple[Any, int]:
        """(one field of the state, such as 'ema', on the shardings of `abstract`; step)."""
        step = self._require(step)
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

    def _require(self, step: int | None) -> int:
        self.wait()
        step = self.latest_step if step is None else step
        if step is None:
            raise UserError(
                f"{self.directory} holds no checkpoint: train first, with"
                " python -m ditjax.train --config=... --workdir=..."
            )
        return step

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
