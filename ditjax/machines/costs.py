"""What a recipe would cost on a given machine, in hours: in closed form, or from a compiled plan.

Training is a roofline of products, memory and links. At best they all overlap, parameters are
gathered once per step, gradients are sent in the compute dtype and every link of a chip is busy.
With nothing hidden the time of the links is added, parameters are gathered twice, gradients are
sent in float32 and one ring is busy. Sampling counts its products only, at the peak rate. Every
figure is printed with its `label`.
"""

from pathlib import Path
from typing import NamedTuple

from ditjax.config import Config
from ditjax.machines import planning, roofline
from ditjax.machines.chips import GB
from ditjax.machines.topology import Topology
from ditjax.parallel.mesh import axis_sizes
from ditjax.tasks import cost_of, sampling_gflops

ESTIMATED = "estimated in closed form, not run"


class Cost(NamedTuple):
    """The cost of one recipe on all chips of a topology, its slices together, in wall-clock hours.

    `needed` of the `hbm` bytes of a device: the state only in closed form, everything in a plan.
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
        """Training and sampling together, at best and with nothing hidden."""
        return self.chips * (self.best + self.sampling), self.chips * (self.worst + self.sampling)

    @property
    def fits(self) -> bool:
        """Whether what is known to be needed fits into the memory."""
        return self.needed <= self.hbm


def estimate(c: Config, topology: Topology) -> Cost:
    """The cost in closed form. Raises UserError for a mesh that does not fill the topology."""
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
    cost = cost_of(c)
    split = cost.parameters / sizes["tensor"]
    shard = split / sizes["fsdp"]
    state = 4 * (4 + len(c.train.averages)) * shard  # itself, the EMA, two moments; further ones
    width = 2 if c.model.dtype == "bfloat16" else 4
    gathered_twice = roofline.fsdp_bytes(split, sizes["fsdp"], width)
    fewest = gathered_twice * 2 / 3 + roofline.all_reduce_bytes(width * shard, copies)
    most = gathered_twice + roofline.all_reduce_bytes(4 * shard, copies)
    step = roofline.StepTime(
        compute=roofline.hardware_flops(cost, c.train.batch_size) / (count * _peak(c, topology)),
        memory=roofline.memory_traffic(state, 0) / (chip.hbm_gb_s * GB / chip.cores),
        wires=fewest / _link_bytes(c, topology, 2 * chip.torus),
    )
    unhidden = step._replace(wires=most / _link_bytes(c, topology, 2))
    return Cost(
        ESTIMATED,
        topology.chips * m.slices,
        step.overlapped * c.train.steps / 3600,
        unhidden.sequential * c.train.steps / 3600,
        sampling_hours(c, topology),
        state,
        chip.device_hbm_bytes,
    )


def compiled(c: Config, topology: Topology, cache: Path | None = None) -> Cost:
    """The cost of the real train step, compiled for the topology by `planning.py`.

    Hours are NaN if it does not fit. Raises UserError if the compiler is not installed.
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
    """Hours to draw the samples that are scored during and after training: the DiT's products."""
    every = c.train.evaluate_every_steps
    images = c.evaluate.num_samples
    images += c.train.steps // every * c.train.evaluate_num if every else 0
    count = topology.chips * topology.chip.cores * c.mesh.slices
    flops = 2e9 * sampling_gflops(c) * images
    return flops / (count * _peak(c, topology)) / 3600


def _peak(c: Config, topology: Topology) -> float:
    """Peak FLOP/s of one device."""
    return topology.chip.rates.device_flops(c.model.dtype, c.model.matmul)


def _link_bytes(c: Config, topology: Topology, links: int) -> float:
    """Bytes per second that a device sends, over `links` links of a torus or all NVLinks of a GPU.

    Between slices or nodes, the devices of one share its network.
    """
    chip = topology.chip
    inside = chip.link_gb_s * GB * (links if chip.torus else 1)
    island = topology.chips if chip.torus else min(topology.chips, 8)
    if c.mesh.slices * topology.chips == island:
        return inside
    return min(inside, chip.network_gb_s * GB * island)
