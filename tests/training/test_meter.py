"""What is counted of steps, whoever looks when."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditjax.training.meter import Meter

NAN = float("nan")


def metrics(loss, skipped=None):
    loss = jnp.float32(loss)
    skipped = ~jnp.isfinite(loss) if skipped is None else jnp.array(skipped)
    return {"grad_norm": 2 * loss, "loss": loss, "skipped": skipped}


def records(step):
    return np.arange(20) + 100 * step


def meter(most=5, said=None, **kwargs):
    return Meter(
        most,
        records,
        (lambda _: None) if said is None else said.append,
        **{"in_flight": 2, **kwargs},
    )


def counts(m):
    position = m.position()
    return position["skipped"], position["skipped_in_a_row"]


def test_means_leave_out_what_was_skipped():
    m = meter()
    for step, loss in enumerate((1.0, NAN, 4.0, 2.5), 1):
        assert not m.add(step, metrics(loss), wait=step == 4)
    row = m.row()
    # Strict JSON has no NaN.
    assert json.loads(json.dumps(row, allow_nan=False)) == {
        "grad_norm": 5.0,
        "loss": 2.5,
        "skipped": 1,
        "skipped_steps": [
            {"step": 2, "loss": "nan", "grad_norm": "nan", "index": list(range(200, 220))}
        ],
    }
    m.add(5, metrics(3.0), wait=True)
    assert m.row() == {"grad_norm": 6.0, "loss": 3.0}
    m.add(6, metrics(NAN), wait=True)
    assert set(m.row()) == {"skipped", "skipped_steps"}
    assert m.row() == {}
    assert counts(m) == (2, 1)


def test_a_step_is_looked_at_when_those_after_it_are_under_way():
    said: list[str] = []
    m = meter(said=said)
    for step, count in ((1, 0), (2, 0), (3, 1), (4, 2)):
        assert not m.add(step, metrics(NAN), wait=False)
        assert len(said) == count
    assert said[0].startswith("step 1 skipped: loss nan, gradient norm nan; of examples 100, 101,")
    assert said[0].endswith("115 and 4 more")
    m.add(5, metrics(NAN), wait=True)
    assert [line.split()[1] for line in said] == ["1", "2", "3", "4", "5"]


def test_a_spike_is_called_one():
    said: list[str] = []
    meter(said=said).add(1, metrics(40.0, skipped=True), wait=True)
    assert said[0].startswith("step 1 skipped: gradient norm 80, a spike beside")


@pytest.mark.parametrize("most", [0, 1, 3])
def test_one_more_than_the_most_ends_it(most):
    m = meter(most)
    assert not m.add(1, metrics(1.0), wait=True)
    for k in range(most + 2):
        assert not m.add(2 + k, metrics(NAN), wait=False)
    assert m.add(4 + most, metrics(1.0), wait=False), "that of step 2 + most is looked at"
    assert m.changed
    # Two that were bad, and a good one, were under way.
    assert counts(m) == (most + 2, 0)
    steps = f"steps 2 to {3 + most}, {most + 2} in a row, were skipped: step 2 of examples 200, 2"
    error = str(m.error(7))
    assert error.startswith(steps)
    assert f"loss nan, gradient norm nan at step {3 + most}. Look at the examples" in error
    assert error.endswith("checkpoint 7 has the last good state.")
    assert "\n" not in error
    assert str(m.error(None)).endswith("nothing was learned.")


def test_a_step_alone_is_named_alone():
    m = meter(0)
    assert m.add(4, metrics(NAN), wait=True)
    assert str(m.error(3)).startswith("step 4 was skipped, of examples 400, 401")
    assert not m.changed


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.booleans(), min_size=1, max_size=14),
    st.integers(0, 3),
    st.data(),
)
def test_a_resume_counts_on(bad, most, cuts):
    """Cut at a checkpoint, anywhere: the same end, the same counts, the same lines of the log."""
    cut = cuts.draw(st.integers(1, len(bad)))

    def run(m, first, last, log):
        for step in range(first, last + 1):
            logs = step % 5 == 0 or step == len(bad)
            loss = NAN if bad[step - 1] else 1 / step
            ends = m.add(step, metrics(loss), wait=logs or step == cut)
            if ends or logs:
                log.append((step, m.row()))
            if ends:
                return step, str(m.error(1))
        return None

    expected_log: list[tuple] = []
    log: list[tuple] = []
    unbroken = meter(most)
    expected = run(unbroken, 1, len(bad), expected_log)
    first = meter(most)
    end = run(first, 1, cut, log)
    if end is None:
        position = json.loads(json.dumps(first.position(), allow_nan=False))
        resumed = meter(most, start=cut, position=position)
        end = run(resumed, cut + 1, len(bad), log)
        assert counts(resumed) == counts(unbroken)
        assert resumed.ended == unbroken.ended
    assert end == expected
    assert log == expected_log
    # And by hand: the first row of bad ones that is too long.
    rows = np.array([bad[max(0, k - most) : k + 1] == [True] * (most + 1) for k in range(len(bad))])
    assert (end is not None) == rows.any()
    if end:
        assert 0 <= end[0] - 1 - int(rows.argmax()) <= 2


def test_a_run_that_had_ended_says_so():
    position = {"skipped": 4, "skipped_in_a_row": 3}
    assert not meter(3, start=20, position=position).ended
    m = meter(2, start=20, position=position)
    assert m.ended
    assert str(m.error(20)).startswith("steps 18 to 20, 3 in a row, were skipped: step 18 of")
    assert not meter(2, position={"seed": 0}).ended, "of a checkpoint that has no counts"
