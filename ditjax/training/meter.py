"""The metrics of training steps: means over a logging interval, and the skipped steps.

Metrics stay on the devices until they are needed. Only the flag "skipped" of each step is read, and
only once the devices have finished that step anyway, so counting never makes the host wait.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from ditjax.errors import UserError
from ditjax.training.step import Metrics

_NAMED = 16  # examples that a printed line names; the log has all
# Keys of a checkpoint's position: the number of skipped steps, the number since the last good step,
# and of the steps since the last line of the log, the metrics and the skipped ones.
TOTAL, IN_A_ROW = "skipped", "skipped_in_a_row"
UNLOGGED, UNLOGGED_SKIPPED = "unlogged", "unlogged_skipped"


class Skipped(NamedTuple):
    """A step whose update was skipped: its number, its examples, and its loss and gradient norm."""

    step: int
    examples: list[int]  # records in the split
    loss: float
    grad_norm: float

    def record(self) -> dict[str, Any]:
        """The step as strict JSON for the log: non-finite numbers are strings."""
        return {
            "step": self.step,
            "loss": _json(self.loss),
            "grad_norm": _json(self.grad_norm),
            "index": self.examples,
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of `record`."""
        loss, norm = float(record["loss"]), float(record["grad_norm"])
        return cls(record["step"], list(record["index"]), loss, norm)

    @property
    def reason(self) -> str:
        """Why it was skipped, as text."""
        if np.isfinite(self.loss) and np.isfinite(self.grad_norm):
            return f"gradient norm {self.grad_norm:.4g}, a spike beside its running mean"
        return f"loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}"


class Meter:
    """Collects the metrics of a run's steps, which are added in order.

    More than `most` skipped steps in a row end the run. `records_of(step)` returns the examples of
    a step's batch. `warn` prints a line for each skipped step. At most `in_flight` steps are kept
    unread. `position` is what a checkpoint recorded of the steps up to `start`.
    """

    def __init__(
        self,
        most: int,
        records_of: Callable[[int], np.ndarray],
        warn: Callable[[str], None],
        *,
        in_flight: int,
        start: int = 0,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        before = position or {}
        self.total: int = before.get(TOTAL, 0)
        self.in_a_row: int = before.get(IN_A_ROW, 0)
        self.changed = False  # whether a step changed the state since it was last saved
        self._most, self._in_flight = most, in_flight
        self._records_of, self._warn = records_of, warn
        # The message about too many skipped steps, of this run or of the one that it resumes.
        self._over = self._too_many(start) if self.ended else ""
        self._waiting: list[tuple[int, Metrics]] = []  # not read yet
        # Since the last `row`:
        self._good: list[Any] = [
            {name: np.dtype(dtype).type(value) for name, (dtype, value) in metrics.items()}
            for metrics in before.get(UNLOGGED, [])
        ]
        self._skipped = [Skipped.of(record) for record in before.get(UNLOGGED_SKIPPED, [])]

    def position(self) -> dict[str, Any]:
        """What a checkpoint records, so that a resumed run continues counting and logging.

        The last step must have been added with `wait`. Float32 numbers survive JSON exactly.
        """
        good = jax.device_get(self._good)
        return {
            TOTAL: self.total,
            IN_A_ROW: self.in_a_row,
            UNLOGGED: [{k: [v.dtype.name, _json(v.item())] for k, v in m.items()} for m in good],
            UNLOGGED_SKIPPED: [skipped.record() for skipped in self._skipped],
        }

    def add(self, step: int, metrics: Metrics, *, wait: bool) -> bool:
        """Add the metrics of a step; return whether the run must end because of skipped steps.

        With `wait`, and if the run must end, all steps so far are counted.
        """
        metrics["skipped"].copy_to_host_async()
        self._waiting.append((step, metrics))
        ends = False
        while len(self._waiting) > (0 if wait or ends else self._in_flight):
            ends = self._count(*self._waiting.pop(0)) or ends
        return ends

    @property
    def ended(self) -> bool:
        """Whether too many of the last steps were skipped."""
        return self.in_a_row > self._most

    def _count(self, step: int, metrics: Metrics) -> bool:
        """Count one step; return whether it is one skipped step too many."""
        jax.block_until_ready(metrics)
        if not np.asarray(metrics["skipped"]):
            self.in_a_row, self.changed = 0, True
            self._good.append({name: x for name, x in metrics.items() if name != "skipped"})
            return False
        self.total += 1
        self.in_a_row += 1
        loss, norm = jax.device_get((metrics["loss"], metrics["grad_norm"]))
        skipped = Skipped(step, self._records_of(step).tolist(), float(loss), float(norm))
        self._skipped.append(skipped)
        self._warn(f"step {step} skipped: {skipped.reason}; of {_examples(skipped.examples)}")
        if self.in_a_row <= self._most:
            return False
        self._over = f"{self._too_many(step)}; {skipped.reason} at step {step}"
        return True

    def _too_many(self, last: int) -> str:
        """A message about the skipped steps up to `last`, and the examples of the first."""
        count, first = self.in_a_row, last - self.in_a_row + 1
        began = _examples(self._records_of(first).tolist())
        if count == 1:
            return f"step {last} was skipped, of {began}"
        return f"steps {first} to {last}, {count} in a row, were skipped: step {first} of {began}"

    def error(self, kept: int | None) -> UserError:
        """The error that ends the run; `kept` is the step of its newest checkpoint."""
        return UserError(
            f"{self._over}. Look at the examples (metrics.jsonl has all), lower"
            " config.optim.learning_rate in another --workdir, or raise config.train.max_bad_steps;"
            + (f" checkpoint {kept} has the last good state." if kept else " nothing was learned.")
        )

    def row(self) -> dict[str, Any]:
        """A row of the log: the mean of each metric since the last row, and the skipped steps."""
        fetched = jax.device_get(self._good)
        names = fetched[0] if fetched else {}
        row: dict[str, Any] = {name: float(np.mean([m[name] for m in fetched])) for name in names}
        if self._skipped:
            row["skipped"] = len(self._skipped)
            row["skipped_steps"] = [skipped.record() for skipped in self._skipped]
        self._good, self._skipped = [], []
        return row


def _examples(index: list[int]) -> str:
    more = len(index) - _NAMED
    named = ", ".join(map(str, index[:_NAMED]))
    return f"examples {named}" + (f" and {more} more" if more > 0 else "")


def _json(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)
