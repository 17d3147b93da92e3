"""What a recipe would cost on a machine that is named: hours, in closed form or of a real plan.

Training is a roofline of products, memory and links. At best all work at once, parameters are
gathered once a step, gradients travel in the compute's type and every link of a chip is busy; with
nothing hidden the links' time is added, parameters are gathered twice, gradients travel in float32
and one ring is busy. Sampling is its products alone, at the peak. `label` goes with every figure.
"""

from pathlib import Path
from typing import NamedTuple

from ditjax.config import Config
from ditjax.machines import planning, roofline
from ditjax.machines.topology import GB, Topology
from ditjax.models.cost import trainable_parameters
from ditjax.parallel.mesh import axis_sizes
from ditjax.tasks import build

ESTIMATED = "estimated in closed form, not run"

# float32 of a parameter, its average and Adam's two moments.
_STATE_BYTES = 16


class Cost(NamedTuple):
    """Of one recipe on all chips of a topology, its slices together; hours of wall clock.

    `needed` of a device's `hbm` bytes: the state alone in closed form, everything in a plan.
    """

    label: str
    chips: int
    best: float
    worst: float
    sampling: float
    needed: float
    hbm: float

    @property
    def chip_hours(self) -> tuple[float, float]:
        """Training and sampling, at best and with nothing hidden."""
        return self.chips * (self.best + self.sampling), self.chips * (self.worst + self.sampling)

    @property
    def fits(self) -> bool:
        """Whether the machine's memory holds what is known to be needed."""
        return self.needed <= self.hbm


def estimate(c: Config, topology: Topology) -> Cost:
    """In closed form. Raises UserError for a mesh that is none on the topology."""
    chip, m = topology.chip, c.mesh
    sizes = axis_sizes(
        topology.chips * chip.cores,
        data=m.data,
        fsdp=m.fsdp,
        tensor=m.tensor,
        context=m.context,
        slices=m.slices,
    )
    count = topology.chips * chip.cores * m.slices
    copies = sizes["data"] * m.slices
    shape = build.cost(c)
    split = trainable_parameters(shape) / sizes["tensor"]
    shard = split / sizes["fsdp"]
    width = 2 if c.model.dtype == "bfloat16" else 4
    gathered_twice = roofline.fsdp_bytes(split, sizes["fsdp"], width)
    fewest = gathered_twice * 2 / 3 + roofline.all_reduce_bytes(width * shard, copies)
    most = gathered_twice + roofline.all_reduce_bytes(4 * shard, copies)
    step = roofline.Step(
        compute=roofline.hardware_flops(shape, c.train.batch_size, c.model.remat)
        / (count * _peak(c, topology)),
        memory=roofline.memory_traffic(_STATE_BYTES * shard, 0) / (chip.hbm_gb_s * GB / chip.cores),
        wires=fewest / _link_bytes(c, topology, 2 * chip.torus),
    )
    unhidden = step._replace(wires=most / _link_bytes(c, topology, 2))
    return Cost(
        ESTIMATED,
        topology.chips * m.slices,
        step.overlapped * c.train.steps / 3600,
        unhidden.sequential * c.train.steps / 3600,
        sampling_hours(c, topology),
        _STATE_BYTES * shard,
        chip.device_hbm_bytes,
    )


def compiled(c: Config, topology: Topology, cache: Path | None = None) -> Cost:
    """Of the real train step, compiled for the topology (`planning.py`).

    Raises UserError where the compiler for it is not installed. What does not fit has no hours.
    """
    plan = planning.make_plan(c, topology, c.train.steps, cache)
    hours = plan.get("cost", {}).get("hours", {})
    return Cost(
        planning.LABEL,
        plan["chips"],
        hours.get("overlapped", float("nan")),
        hours.get("sequential", float("nan")),
        sampling_hours(c, topology),
        plan["memory"]["peak_bytes"],
        plan["memory"]["hbm_bytes"],
    )


def sampling_hours(c: Config, topology: Topology) -> float:
    """Of the samples that are scored at the end and along training: the DiT's products alone."""
    every = c.train.evaluate_every_steps
    images = c.evaluate.num_samples
    images += c.train.steps // every * c.train.evaluate_num if every else 0
    count = topology.chips * topology.chip.cores * c.mesh.slices
    flops = 2e9 * build.sampling_gflops(c) * images
    return flops / (count * _peak(c, topology)) / 3600


def _peak(c: Config, topology: Topology) -> float:
    """FLOP/s of one device."""
    return topology.chip.rates.device_flops(c.model.dtype, c.model.matmul)


def _link_bytes(c: Config, topology: Topology, links: int) -> float:
    """Bytes a second that a device sends: over so many links of a torus, or all NVLinks of a GPU;
    between slices or nodes, each of whose devices sends its share, no more than the network."""
    chip = topology.chip
    inside = chip.link_gb_s * GB * (links if chip.torus else 1)
    island = topology.chips if chip.torus else min(topology.chips, 8)
    if c.mesh.slices * topology.chips == island:
        return inside
    return min(inside, chip.network_gb_s * GB * island)
