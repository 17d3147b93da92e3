"""What comes back of the steps: an interval's means, and the steps that changed nothing.

Metrics stay on the devices until they are needed. Of each step only the flag "skipped" is read,
when the devices have done the steps up to it anyway: counting costs no wait.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from ditjax.errors import UserError
from ditjax.training.step import Metrics

_NAMED = 16  # so many examples a line for people has; the log has all
# Keys of a checkpoint's position: all skipped steps so far, those since the last good one, and of
# the steps that no line of the log has the metrics, and which were skipped.
TOTAL, IN_A_ROW = "skipped", "skipped_in_a_row"
UNLOGGED, UNLOGGED_SKIPPED = "unlogged", "unlogged_skipped"


class Skipped(NamedTuple):
    """A step whose update was not taken: its number, its examples, and what was wrong with it."""

    step: int
    examples: list[int]  # records in the split
    loss: float
    grad_norm: float

    def record(self) -> dict[str, Any]:
        """For the log, as strict JSON: what is not finite is a word."""
        return {
            "step": self.step,
            "loss": _json(self.loss),
            "grad_norm": _json(self.grad_norm),
            "index": self.examples,
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """What `record` was made of."""
        loss, norm = float(record["loss"]), float(record["grad_norm"])
        return cls(record["step"], list(record["index"]), loss, norm)

    @property
    def reason(self) -> str:
        """What was wrong, for people."""
        if np.isfinite(self.loss) and np.isfinite(self.grad_norm):
            return f"gradient norm {self.grad_norm:.4g}, a spike beside its running mean"
        return f"loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}"


class Meter:
    """The metrics of a run's steps, given in order.

    More than `most` skipped steps in a row end the run. `records_of(step)` are the examples of a
    step's batch; `say` tells of a step that was skipped. At most `in_flight` steps wait for the
    devices. `position` is what a checkpoint says of the steps up to `start`.
    """

    def __init__(
        self,
        most: int,
        records_of: Callable[[int], np.ndarray],
        say: Callable[[str], None],
        *,
        in_flight: int,
        start: int = 0,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        before = position or {}
        self.total: int = before.get(TOTAL, 0)
        self.in_a_row: int = before.get(IN_A_ROW, 0)
        self.changed = False  # the state, since it was last saved
        self._most, self._in_flight = most, in_flight
        self._records_of, self._say = records_of, say
        # Which steps were too many: of this call, or of one before.
        self._over = self._too_many(start) if self.ended else ""
        self._waiting: list[tuple[int, Metrics]] = []  # nothing of them was looked at
        # Since the last `row`.
        self._good: list[Any] = [
            {name: np.dtype(dtype).type(value) for name, (dtype, value) in metrics.items()}
            for metrics in before.get(UNLOGGED, [])
        ]
        self._skipped = [Skipped.of(record) for record in before.get(UNLOGGED_SKIPPED, [])]

    def position(self) -> dict[str, Any]:
        """For a checkpoint of a step that was waited for: a resumed run counts and logs on.

        Float32 through JSON and back is exact.
        """
        good = jax.device_get(self._good)
        return {
            TOTAL: self.total,
            IN_A_ROW: self.in_a_row,
            UNLOGGED: [{k: [v.dtype.name, _json(v.item())] for k, v in m.items()} for m in good],
            UNLOGGED_SKIPPED: [skipped.record() for skipped in self._skipped],
        }

    def add(self, step: int, metrics: Metrics, *, wait: bool) -> bool:
        """Takes a step's metrics; whether the run is to end here, all steps so far being counted.

        With `wait` all are counted in any case.
        """
        metrics["skipped"].copy_to_host_async()
        self._waiting.append((step, metrics))
        ends = False
        while len(self._waiting) > (0 if wait or ends else self._in_flight):
            ends = self._look(*self._waiting.pop(0)) or ends
        return ends

    @property
    def ended(self) -> bool:
        """Whether the last steps so far were too many: of a run that has come to its end."""
        return self.in_a_row > self._most

    def _look(self, step: int, metrics: Metrics) -> bool:
        """Counts one step; whether it is one too many."""
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
        self._say(f"step {step} skipped: {skipped.reason}; of {_examples(skipped.examples)}")
        if self.in_a_row <= self._most:
            return False
        self._over = f"{self._too_many(step)}; {skipped.reason} at step {step}"
        return True

    def _too_many(self, last: int) -> str:
        """The steps in a row up to `last`, and the examples that they began with."""
        count, first = self.in_a_row, last - self.in_a_row + 1
        began = _examples(self._records_of(first).tolist())
        if count == 1:
            return f"step {last} was skipped, of {began}"
        return f"steps {first} to {last}, {count} in a row, were skipped: step {first} of {began}"

    def error(self, kept: int | None) -> UserError:
        """What ends the run; `kept` is its newest checkpoint."""
        return UserError(
            f"{self._over}. Look at the examples (metrics.jsonl has all), lower"
            " config.optim.learning_rate in another --workdir, or raise config.train.max_bad_steps;"
            + (f" checkpoint {kept} has the last good state." if kept else " nothing was learned.")
        )

    def row(self) -> dict[str, Any]:
        """The log's line: each metric's mean since the last, the skipped steps told apart."""
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
