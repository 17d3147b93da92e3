"""From a prepared data set to training batches: one infinite, seeded stream, read by position.

Element j of the stream is a pure function of (seed, j), and batch k of size B holds elements
[k*B, (k+1)*B). So a run resumed at any step, on any number of processes, sees the same records with
the same flips.

Grain prepares batches ahead of the training loop, in order. The order of an epoch is drawn here:
grain's own shuffle works index by index, and 64 of its indices take 1.7 ms where a whole batch of
digits takes 0.3 ms.
"""

import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import grain
import numpy as np

from ditjax.data.names import is_latents
from ditjax.data.records import (
    DamagedRecordsError,
    HostBatch,
    ImageReader,
    LatentReader,
    open_image_reader,
)
from ditjax.data.source import DataSpec, open_split
from ditjax.errors import UserError
from ditjax.files.masking import masked
from ditjax.files.store import append_line

# Philox streams of one seed: 0, 1, 2, ... order the epochs, the last one draws the flips, and the
# one before it the captions.
_FLIPS, _CAPTIONS = 2**64 - 1, 2**64 - 2
_BATCHES_AHEAD = 2


# ---- the seeded order


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order of one epoch: a permutation i64[num_examples], a pure function of the arguments.

    Records are sorted by random 64-bit words. NumPy promises never to change Philox's words, unlike
    Generator.permutation, so that a run can be resumed years later.
    """
    return np.argsort(_words(seed, epoch, 0, num_examples), kind="stable")


def records_of_step(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """The records in the global batch of a step, the first being step 1: i64[batch_size].

    This is 'index' of `train_batches` for all rows, a pure function of (seed, step).
    """
    stop = step * batch_size
    return _records(
        lambda epoch: epoch_order(seed, epoch, num_examples), num_examples, stop - batch_size, stop
    )


def _records(
    order: Callable[[int], np.ndarray], num_examples: int, start: int, stop: int
) -> np.ndarray:
    """Records of the stream's elements [start, stop): epoch after epoch, nothing dropped."""
    parts = []
    while start < stop:
        epoch, first = divmod(start, num_examples)
        last = min(num_examples, first + stop - start)
        parts.append(order(epoch)[first:last])
        start += last - first
    return np.concatenate(parts).astype(np.int64)


def flips(seed: int, start: int, count: int) -> np.ndarray:
    """Whether elements [start, start + count) of the stream are mirrored: bool[count], p = 1/2."""
    # A Philox block is four words; element j owns block j.
    return _words(seed, _FLIPS, start, 4 * count)[::4] >> np.uint64(63) == 1


def caption_choices(seed: int, start: int, count: int) -> np.ndarray:
    """What chooses the captions of elements [start, start + count) of the stream: f64 in [0, 1)."""
    return (_words(seed, _CAPTIONS, start, 4 * count)[::4] >> np.uint64(11)) * 2.0**-53


def _words(seed: int, stream: int, block: int, count: int) -> np.ndarray:
    """Philox4x64-10 (Salmon et al. 2011) with key (seed, stream), from a counter: u64[count]."""
    key = np.array([seed, stream], np.uint64)
    return np.random.Philox(key=key, counter=block).random_raw(count)


# ---- damaged records


Warn = Callable[[str], None]


def print_warning(line: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


DAMAGED_FILE = "damaged.txt"  # damaged records that were skipped, one a line


def record_warnings(path: Path) -> Warn:
    """Print warnings, and append each to a file once, however often the run is resumed."""

    def warn(line: str) -> None:
        line = masked(line)
        print_warning(line)
        recorded = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if line not in recorded:
            append_line(path, line)

    return warn


class _SkippingReader:
    """A reader that replaces up to `max_damaged` records by others.

    A damaged record is replaced by the next readable one in an order that the caller gives, so the
    replacement does not depend on when, where and by which process the damage is met.
    """

    def __init__(self, reader: ImageReader | LatentReader, max_damaged: int, warn: Warn) -> None:
        self._reader, self._max, self._warn = reader, max_damaged, warn
        self.num_examples = reader.num_examples
        self._damaged: set[int] = set()
        self._lock = threading.Lock()

    def batch(
        self,
        indices: np.ndarray,
        mirrored: np.ndarray,
        after: Callable[[int, int], int],
        *chosen: np.ndarray,
    ) -> HostBatch:
        """Records `indices` i64[n], with the records that were read as 'index' i64[n].

        `chosen` f64[n] chooses their captions, if the data set has any.
        after(row, k) is the k-th record after that of a row. Past the limit, DamagedRecordsError is
        raised.
        """
        while True:
            if self._damaged:
                indices = np.array([self._sound(i, row, after) for row, i in enumerate(indices)])
            try:
                return {**self._reader.batch(indices, mirrored, *chosen), "index": indices}
            except DamagedRecordsError as error:
                self._note(error)

    def close(self) -> None:
        self._reader.close()

    def _sound(self, index: int, row: int, after: Callable[[int, int], int]) -> int:
        for k in range(1, self.num_examples + 1):
            if index not in self._damaged:
                return int(index)
            index = after(row, k)
        raise UserError("every record of the data set is damaged: prepare it again.")

    def _note(self, error: DamagedRecordsError) -> None:
        with self._lock:
            for index, what in sorted(error.records.items()):
                if index in self._damaged:  # another thread's batch met it too
                    continue
                if len(self._damaged) == self._max:
                    remedy = (
                        f"{error.remedy.rstrip('.')}, or set config.data.max_damaged to skip it."
                    )
                    if self._max:
                        many = f"more than config.data.max_damaged={self._max} records are"
                        remedy = f"{many}: {error.remedy}"
                    raise DamagedRecordsError({index: what}, remedy) from error
                self._damaged.add(index)
                self._warn(f"{what}; skipped, as config.data.max_damaged={self._max} allows")


# ---- batches


class _ProcessBatches(grain.sources.RandomAccessDataSource):
    """Batch k of one process, for any k: `rows` of global batch k."""

    def __init__(
        self, spec: DataSpec, seed: int, batch_size: int, rows: np.ndarray, warn: Warn
    ) -> None:
        reader: ImageReader | LatentReader
        if is_latents(spec.name):
            if spec.text is not None:
                raise UserError(
                    f"config.data.name is {spec.name!r}, encoded latents, which hold no captions:"
                    " name a data set of images with captions."
                )
            opened = open_split(spec.name, spec.split)
            reader = LatentReader(opened, spec.cache_mb)
        else:
            reader = open_image_reader(spec, spec.cache_mb)
        self.reader = _SkippingReader(reader, spec.max_damaged, warn)
        self._N = self.reader.num_examples
        self._rows, self._batch_size = rows, batch_size
        self._seed, self._flip, self._captioned = seed, spec.flip, spec.text is not None
        # A batch may straddle two epochs, and the one ahead may already be in the next.
        self._order = lru_cache(maxsize=3)(lambda e: epoch_order(seed, e, self._N))

    def __len__(self) -> int:
        return 2**48  # grain needs a number; this is more than the steps of any run

    def __getitem__(self, k: Any) -> HostBatch:
        B = self._batch_size
        start = int(k) * B
        indices = _records(self._order, self._N, start, start + B)[self._rows]
        mirrored = flips(self._seed, start, B) if self._flip else np.zeros(B, bool)
        mirrored = mirrored[self._rows]
        chosen = [caption_choices(self._seed, start, B)[self._rows]] if self._captioned else []
        return self.reader.batch(
            indices, mirrored, lambda row, k: self._after(start + int(self._rows[row]), k), *chosen
        )

    def _after(self, element: int, k: int) -> int:
        """The k-th record after that of an element of the stream, in its own epoch's order."""
        epoch, first = divmod(element, self._N)
        return int(self._order(epoch)[(first + k) % self._N])


class Batches(Iterator[HostBatch]):
    """An endless iterator of batches. close() ends its threads; so does leaving a `with` block."""

    def __init__(self, source: _ProcessBatches, start_step: int) -> None:
        self._source = source
        options = grain.ReadOptions(num_threads=_BATCHES_AHEAD, prefetch_buffer_size=_BATCHES_AHEAD)
        dataset = grain.MapDataset.source(source)[start_step:].to_iter_dataset(options)
        self._iterator = iter(dataset)

    def __next__(self) -> HostBatch:
        return next(self._iterator)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._iterator.close()
        self._source.reader.close()


def train_batches(
    spec: DataSpec,
    seed: int,
    batch_size: int,
    *,
    start_step: int = 0,
    rows: np.ndarray | None = None,
    warn: Warn = print_warning,
) -> Batches:
    """Endless batches of this process from step start_step on: a pure function of (seed, step).

    A batch holds the `rows` i[b] of the global batch, None for all: 'image' f32[b,H,W,C] = x/127.5
    - 1 in [-1,1] (for encoded latents 'mean' and 'log_variance' f32[b,h,w,c]), 'label' i32[b], and
    'index' i64[b], the record in the split; with spec.text also 'caption' i32[b,M], the tokens of
    one of the record's captions, and 'classes'. Every epoch holds every record once, in an order of
    its own; batches straddle epochs, and no remainder is dropped. A damaged record is reported once
    by `warn` and replaced by the next readable one in its epoch's order.

    Raises UserError at once for invalid arguments or a data set that cannot be opened. The iterator
    raises DamagedRecordsError beyond spec.max_damaged records; each process counts its own since it
    started.
    """
    if batch_size < 1:
        raise UserError(f"global batch size {batch_size}: expected at least 1.")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not rows.size or rows.min() < 0 or rows.max() >= batch_size:
        raise UserError(
            f"rows {rows.tolist()} of a batch of {batch_size}: expected some from 0 to"
            f" {batch_size - 1}."
        )
    if not 0 <= seed < 2**64:
        raise UserError(f"data seed {seed} is outside 0..2**64-1.")
    if start_step < 0:
        raise UserError(f"start_step {start_step} is negative: steps count from 0.")
    return Batches(_ProcessBatches(spec, seed, batch_size, rows, warn), start_step)


def in_order(
    spec: DataSpec,
    batch_size: int,
    ranges: Iterable[range] | None = None,
    warn: Warn = print_warning,
) -> Generator[HostBatch, None, None]:
    """Every record of the split once, in record order, never flipped; the last batch may be short.

    With `ranges`, only their records, range after range; the last batch of each may be short.
    Batches are those of `train_batches`; a damaged record is replaced by the next readable one.
    """
    reader = _SkippingReader(open_image_reader(spec, 0), spec.max_damaged, warn)
    N = reader.num_examples
    try:
        for records in [range(N)] if ranges is None else ranges:
            for start in range(records.start, records.stop, batch_size):
                indices = np.arange(start, min(start + batch_size, records.stop))
                yield reader.batch(
                    indices,
                    np.zeros(len(indices), bool),
                    lambda row, k, start=start: (start + row + k) % N,  # type: ignore[misc]
                )
    finally:
        reader.close()


def read_records(
    spec: DataSpec, records: np.ndarray, batch_size: int
) -> Generator[HostBatch, None, None]:
    """The given records i[n] of the split, never flipped; the last batch may be short.

    'image' and 'label' are those of `train_batches`. Raises DamagedRecordsError for a damaged one.
    """
    reader = open_image_reader(spec, 0)
    try:
        for start in range(0, len(records), batch_size):
            indices = np.asarray(records[start : start + batch_size])
            yield reader.batch(indices, np.zeros(len(indices), bool))
    finally:
        reader.close()
