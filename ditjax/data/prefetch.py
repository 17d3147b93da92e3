"""Prefetching: batches are put on the devices ahead of their step."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

Rows = TypeVar("Rows")
Put = TypeVar("Put")


def ahead(
    batches: Iterator[Rows], put: Callable[[Rows], Put], depth: int, count: int
) -> Iterator[Put]:
    """`put` of each of the next `count` batches, started `depth` batches before it is asked for.

    A transfer is dispatched without waiting, so there is no thread to end. No batch beyond `count`
    is read. An error in reading a batch is raised in that batch's turn, however early it was read.
    """
    waiting: deque[Put | Exception] = deque()
    taken = 0
    for k in range(count):
        while taken < min(count, k + depth + 1):
            taken += 1
            try:
                waiting.append(put(next(batches)))
            except Exception as error:
                waiting.append(error)
                taken = count
        batch = waiting.popleft()
        if isinstance(batch, Exception):
            raise batch
        yield batch
