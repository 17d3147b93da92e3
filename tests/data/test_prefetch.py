"""Batches ahead: their order, how far ahead they are read, and when what is wrong is told."""

import itertools

import pytest

from ditjax.data.prefetch import ahead


def read(depth, count):
    """(what each step got, how many batches had been put when it got it)."""
    done = []

    def put(k):
        done.append(k)
        return f"batch {k}"

    return [(batch, len(done)) for batch in ahead(itertools.count(), put, depth, count)]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_each_step_gets_its_batch_and_the_next_are_put(depth):
    got = read(depth, 6)
    assert [batch for batch, _ in got] == [f"batch {k}" for k in range(6)]
    # None is read beyond the last step.
    assert [put for _, put in got] == [min(k + 1 + depth, 6) for k in range(6)]


def test_a_batch_that_cannot_be_read_is_told_at_its_step():
    def damaged():
        yield from range(4)
        raise ValueError("record 4 is damaged")

    batches = ahead(damaged(), str, 3, 10)
    assert [next(batches) for _ in range(4)] == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="record 4"):
        next(batches)
    # And one beyond the last step is nobody's matter.
    assert len(list(ahead(damaged(), str, 3, 4))) == 4


def test_an_interrupt_is_not_kept_for_later():
    def interrupted():
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(ahead(interrupted(), str, 3, 10))
