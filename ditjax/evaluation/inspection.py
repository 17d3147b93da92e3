"""The inside of a trained network, read on one device: images at fixed noise, and what blocks make.

Everything random is a function of (config.evaluate.seed, image): all blocks, times and networks are
read at the same images and the same noise.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config
from ditjax.data import source, stream
from ditjax.data.names import Split
from ditjax.data.records import HostBatch
from ditjax.diffusion.gaussian import split_channels
from ditjax.diffusion.process import per_sample, precondition
from ditjax.diffusion.samplers import initial_noise
from ditjax.errors import UserError
from ditjax.evaluation.features import Extractor, open_extractor
from ditjax.models.network import Conditions, Taps
from ditjax.parallel import processes
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.tasks import make_task
from ditjax.tasks.adapters import with_adapters
from ditjax.training import keys
from ditjax.training.program import precise
from ditjax.training.task import IDENTITY, Frozen, Inside

TableRow = dict[str, Any]
# Shares of the noise at which a network is read, by default.
NOISE_SHARES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)


class Finding(NamedTuple):
    """What an analysis found: tables of rows, arrays to draw, and a line of words."""

    tables: dict[str, list[TableRow]]
    pictures: dict[str, np.ndarray]
    line: str


ConditionRows = dict[str, Any]  # field of `Conditions` -> its rows, one an image


class Examples(NamedTuple):
    """Images f32[n,H,W,C] in [-1, 1], labels i32[n], examples x0 of the process, their noise.

    Of a network of texts also what is beside the label, by field of `Conditions`, and what each
    token of a text says.
    """

    image: np.ndarray
    label: np.ndarray
    x0: np.ndarray
    eps: np.ndarray
    beside: Mapping[str, np.ndarray] = {}
    pieces: Sequence[Sequence[str]] = ()

    def __len__(self) -> int:
        return len(self.label)

    @property
    def conditions(self) -> ConditionRows:
        """The conditions of the images, without what is given as channels."""
        return {"label": self.label, **self.beside}


# (images f32[n,H,W,C] in [-1, 1], number of a set) -> x0 and eps
MakeExamples = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


class Reading(NamedTuple):
    """Where a network is read: `shares` of the noise, `blocks` from 1 (() = all), `num` images.

    `num` images of the training split fit what is fitted, and as many held-out ones are measured.
    """

    shares: tuple[float, ...] = NOISE_SHARES
    blocks: tuple[int, ...] = ()
    num: int = 1000
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class Instrument:
    """A network, where it is read, and on which images. Parameters are arguments of programs."""

    c: Config
    inside: Inside
    params: Any
    untrained: Any  # the initial parameters of the same recipe
    frozen: Frozen
    shares: tuple[float, ...]
    times: tuple[np.ndarray, ...]  # of the process, one a share
    blocks: tuple[int, ...]  # from 1
    fit: Examples
    held: Examples
    batch_size: int
    extractor: Extractor | None  # of features to compare with
    make: MakeExamples
    record: dict[str, Any]  # where and on what it was read

    @property
    def taken(self) -> np.ndarray:
        """The blocks that are read, from 0."""
        return np.asarray(self.blocks) - 1

    @property
    def middle(self) -> int:
        """The index of the time at which pictures are made."""
        return (len(self.shares) - 1) // 2

    def null_conditions(self, examples: Examples) -> ConditionRows:
        """Null labels and vectors of 0; the same class for all if there is no null label."""
        label = 0 if self.inside.null is None else self.inside.null
        found = {**examples.conditions, "label": np.full(len(examples), label, np.int32)}
        vector = {name: np.zeros_like(x) for name, x in found.items() if name == "vector"}
        return {**found, **vector}

    def at(self, index: int, **values: Any) -> TableRow:
        """A row of a table at a time."""
        return {"share": self.shares[index], "time": self.times[index].item(), **values}

    def over(self, program: Callable[..., Any], rows: Sequence[Any], *args: Any) -> Any:
        """Apply program(*batch of rows, *args) to all rows -> its outputs, whose axis 0 is theirs.

        rows: arrays, or condition rows. The last batch is filled up with zeros, so that a program
        compiles once.
        """
        parts = []
        for count, batch in _batches(tuple(rows), min(self.batch_size, len(rows[0]))):
            with precise(self.c):
                found = program(*batch, *args)
            parts.append(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], found))
        return jax.tree.map(lambda *each: np.concatenate(each), *parts)

    def total(self, program: Callable[..., Any], rows: Sequence[Any], *args: Any) -> Any:
        """Sum program(valid f32[B], *batch of rows, *args) over batches, in float64."""
        total = None
        for count, batch in _batches(tuple(rows), min(self.batch_size, len(rows[0]))):
            valid = processes.padded(np.ones(count, np.float32), len(batch[0]))
            with precise(self.c):
                found = program(valid, *batch, *args)
            found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
            total = found if total is None else jax.tree.map(np.add, total, found)
        return total

    # ---- inside programs

    def noised(self, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """x_t of a batch at the time t []; what the network is given stays behind it."""
        own, given = self._split(x0)
        x_t = self.inside.objective.process.noised(own, jnp.full(len(x0), t), eps)
        return x_t if given is None else jnp.concatenate([x_t, given], axis=-1)

    def own(self, x: jax.Array) -> jax.Array:
        """x0 or x_t without what the network is given."""
        return self._split(x)[0]

    def _split(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """x0 or x_t, and the channels behind them that the network is given, if there are any."""
        C = self.inside.shape[-1]
        return (x, None) if x.shape[-1] == C else (x[..., :C], x[..., C:])

    def _conditions(self, x_t: jax.Array, rows: ConditionRows) -> Conditions:
        levels = self.inside.levels(len(x_t))
        return Conditions(**rows, channels=self._split(x_t)[1], level=levels)

    def observe(
        self, params: Any, x_t: jax.Array, rows: ConditionRows, t: jax.Array, *wanted: str
    ) -> tuple[jax.Array, Taps]:
        """The prediction f32[B,H,W,C] of a batch at the time t [], and what its blocks computed."""
        taps: list[Taps] = []
        conditions = self._conditions(x_t, rows)

        def read(x: jax.Array, time: jax.Array) -> jax.Array:
            out, found = self.inside.read(params, x, time, conditions, *wanted)
            taps.append(found)
            return out

        out = self._evaluated(read, x_t, t)
        return out, taps[-1]

    def through_lens(
        self, params: Any, tokens: jax.Array, x_t: jax.Array, rows: ConditionRows, t: jax.Array
    ) -> jax.Array:
        """The prediction of the layers behind the blocks, of tokens [B,N,D]."""
        conditions = self._conditions(x_t, rows)
        return self._evaluated(
            lambda x, time: self.inside.lens(params, tokens, time, conditions), x_t, t
        )

    def patched(
        self,
        params: Any,
        x_t: jax.Array,
        rows: ConditionRows,
        t: jax.Array,
        mask: jax.Array,
        value: jax.Array,
    ) -> jax.Array:
        """The prediction with the value [L,B,N,D] after blocks where the mask [L,B or 1,N] is."""
        conditions = self._conditions(x_t, rows)
        return self._evaluated(
            lambda x, time: self.inside.patch(params, x, time, conditions, mask, value), x_t, t
        )

    def target(self, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """What the network is trained to predict, f32[B,H,W,C]."""
        objective = self.inside.objective
        return objective.process.target(
            self.own(x0), jnp.full(len(x0), t), eps, objective.prediction
        )

    def x0_of(self, out: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """x̂0 of a prediction."""
        o = self.inside.objective
        p = precondition(o.process, o.prediction, jnp.full(len(x_t), t), t_eps=o.t_eps)
        x_t = self.own(x_t)
        return per_sample(p.c_skip, x_t.ndim) * x_t + per_sample(p.c_out, x_t.ndim) * out

    def _evaluated(self, denoise: Callable[..., Any], x_t: jax.Array, t: jax.Array) -> jax.Array:
        out = self.inside.objective.process.evaluate(denoise, self.own(x_t), jnp.full(len(x_t), t))
        return split_channels(out, self.inside.shape[-1])[0]


def open_instrument(
    c: Config,
    load: Callable[[Config, Mesh], tuple[Any, Frozen]],
    reading: Reading,
    *,
    features: bool = True,
) -> Instrument:
    """Open a network on one device; `load` is that of a `pipeline.Source`.

    Without `features`, those of config.evaluate.features are not opened. Raises UserError for a
    network without blocks, and for blocks, times and images that are not.
    """
    mesh = make_mesh(1, 1, jax.devices()[:1])
    task = make_task(c, mesh)
    inside = task.inside
    if inside is None:
        raise UserError(
            f"config.model.kind is {c.model.kind!r}, whose network has no stack of blocks to"
            " inspect: expected a run or weights of a network that has one, such as 'dit'."
        )
    _check_reading(reading, inside.depth)
    name = c.evaluate.features
    extractor = open_extractor(name, mesh) if features and name != "none" else None
    params, frozen = load(c, mesh)
    params = with_adapters(c, params, mesh)
    if task.transform is not IDENTITY:
        params = jax.jit(task.transform.merge)(frozen["base"], params)
    make = _example_maker(c, inside, frozen, reading.batch_size)
    beside = _beside_maker(c, inside, frozen, reading.batch_size)
    fit, held, images = _examples(c, inside, reading, make, beside)
    untrained = jax.jit(task.init)(keys.stream(c.seed, keys.INIT))
    times = tuple(
        np.asarray(inside.objective.process.from_unit(jnp.float32(u))) for u in reading.shares
    )
    blocks = tuple(sorted(reading.blocks)) or tuple(range(1, inside.depth + 1))
    sampled = task.sampling.protocol if task.sampling else {}
    needs = task.sampling.needs if task.sampling else None
    record = {
        "model": task.name,
        "params_sha256": opening.digest(params),
        "images": images,
        "shares": list(reading.shares),
        "times": [t.item() for t in times],
        "blocks": list(blocks),
        "seed": c.evaluate.seed,
        "null_label": inside.null is not None,
        **({"given": sampled["given"]} if "given" in sampled else {}),
        **({"captions": "first", **needs.protocol()} if needs and needs.reads == "caption" else {}),
        **({"features": extractor.record} if extractor else {}),
    }
    params, untrained = (inside.variables(frozen, each) for each in (params, untrained))
    data = (fit, held, reading.batch_size)
    where = (reading.shares, times, blocks)
    return Instrument(c, inside, params, untrained, frozen, *where, *data, extractor, make, record)


def _check_reading(reading: Reading, depth: int) -> None:
    wrong = [b for b in reading.blocks if not 1 <= b <= depth]
    if wrong or len(set(reading.blocks)) < len(reading.blocks):
        raise UserError(
            f"--blocks={','.join(map(str, reading.blocks))}: expected different numbers from 1 to"
            f" {depth}, the depth of this network."
        )
    rising = all(a < b for a, b in zip(reading.shares, reading.shares[1:], strict=False))
    if not rising or not all(0 < share < 1 for share in reading.shares):
        raise UserError(
            f"--times={','.join(map(str, reading.shares))}: expected rising shares of the noise"
            " above 0 and below 1, such as 0.1,0.3,0.5; with 1,000 timesteps, 0.3 is timestep 300."
        )
    if reading.num < 32 or reading.batch_size < 1:
        raise UserError(
            f"--num={reading.num} and --batch_size={reading.batch_size}: expected at least 32"
            " images, and batches of at least 1."
        )


def _examples(
    c: Config,
    inside: Inside,
    reading: Reading,
    make: MakeExamples,
    beside: Callable[[HostBatch], ConditionRows],
) -> tuple[Examples, Examples, dict[str, Any]]:
    """Images to fit, held-out images, and their description; no image is in both."""
    held_spec = opening.held_out(c)
    name, split = source.images_of(Split(c.data.name, c.data.split))
    fit_spec = dataclasses.replace(held_spec, name=name, split=split)
    counts = [
        source.dataset_info(spec.name, spec.split, spec.data_dir).num_examples
        for spec in (fit_spec, held_spec)
    ]
    seed, num = c.evaluate.seed, reading.num
    if fit_spec == held_spec:  # one split for both
        num = min(num, counts[0] // 2)
        both = stream.records_of_step(seed, 1, 2 * num, counts[0])
        records = [both[:num], both[num:]]
    else:
        records = [stream.records_of_step(seed, 1, min(num, n), n) for n in counts]
    if min(map(len, records)) < 32:
        raise UserError(
            f"data set {c.data.name!r} has {len(records[0])} images to fit and"
            f" {len(records[1])} held-out ones: expected at least 32 of each."
        )
    found, pieces = [], inside.pieces
    for part, spec in enumerate((fit_spec, held_spec)):
        batches = list(stream.read_records(spec, records[part], reading.batch_size))
        rows = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
        own = (beside(rows), pieces(rows["caption"]) if pieces else ())
        image, label = rows["image"], rows["label"]
        found.append(Examples(image, label, *make(image, part), *own))
    described = {
        "fit": f"{len(found[0])} of {fit_spec.name}, {fit_spec.split}",
        "held_out": f"{len(found[1])} of {held_spec.name}, {held_spec.split}",
    }
    return found[0], found[1], described


def _example_maker(c: Config, inside: Inside, frozen: Frozen, batch_size: int) -> MakeExamples:
    """Examples and noise of row i of a part, functions of (seed, part, i)."""

    @jax.jit
    def program(frozen: Frozen, key: jax.Array, images: jax.Array, indices: jax.Array) -> Any:
        each = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        return inside.x0(frozen, images, each), initial_noise(each, inside.shape)

    def make(images: np.ndarray, part: int) -> tuple[np.ndarray, np.ndarray]:
        key = jax.random.fold_in(keys.stream(c.evaluate.seed, keys.INSPECT), part)
        indices = np.arange(len(images), dtype=np.uint32)
        parts = []
        for count, rows in _batches((images, indices), batch_size):
            with precise(c):
                found = program(frozen, key, *rows)
            parts.append([np.asarray(x)[:count] for x in found])
        x0, eps = (np.concatenate(each) for each in zip(*parts, strict=True))
        return x0, eps

    return make


def _beside_maker(
    c: Config, inside: Inside, frozen: Frozen, batch_size: int
) -> Callable[[HostBatch], ConditionRows]:
    """The conditions of records beside their labels."""

    @jax.jit
    def program(frozen: Frozen, batch: Any) -> Any:
        return inside.beside(frozen, batch)

    def beside(rows: HostBatch) -> ConditionRows:
        parts = []
        for count, batch in _batches(rows, batch_size):
            with precise(c):
                found = program(frozen, batch)
            parts.append({name: np.asarray(x)[:count] for name, x in found.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return beside


def _batches(rows: Any, size: int) -> Iterator[tuple[int, Any]]:
    """Batches of a tree of rows: how many each has before it is filled up with zeros, and it."""
    for start in range(0, len(jax.tree.leaves(rows)[0]), size):
        part = jax.tree.map(lambda x, at=start: x[at : at + size], rows)
        count = len(jax.tree.leaves(part)[0])
        yield count, jax.tree.map(lambda x: processes.padded(x, size), part)
