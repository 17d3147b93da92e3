"""Topologies of TPUs and GPUs by name, such as 'v5e:16x16': devices to compile for, and rates.

Figures of TPUs are from cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; usable HBM is what the
compiler of libtpu allows. The one-way rate of a link is the documented bidirectional interconnect
bandwidth of a chip / 2 / its links (4 in a 2-D torus, 6 in a 3-D one), and for v4 the 50 GB/s of
Jouppi et al. 2023. Figures of the H100 are from NVIDIA's data sheet of the SXM5 module, dense, with
one 400 Gb/s network port per GPU as in a DGX H100.
"""

import importlib.util
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ditjax.errors import UserError, nearest
from ditjax.machines.chips import GB, GIB, RATES, Rates
from ditjax.machines.hlo import Collective


class Chip(NamedTuple):
    """A generation of accelerators. Figures are per chip; a device is one of its `rates.cores`."""

    name: str
    hbm_gib: float  # usable by a program
    hbm_gb_s: float
    link_gb_s: float  # one way: one link of a torus, or all NVLinks of a GPU
    network_gb_s: float  # between slices, or between the nodes of GPUs
    torus: int  # its dimensions; 0: GPUs in nodes, all connected with one another

    @property
    def rates(self) -> Rates:
        return RATES[self.name]

    @property
    def cores(self) -> int:
        """Devices per chip."""
        return self.rates.cores

    @property
    def device_hbm_bytes(self) -> float:
        """Bytes of one device's memory that a program can use."""
        return self.hbm_gib * GIB / self.cores


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 30.75, 1200, 50, 6.25, torus=3),
        Chip("v5e", 15.75, 819, 50, 3.125, torus=2),
        Chip("v5p", 95.74, 2765, 100, 6.25, torus=3),
        Chip("v6e", 31.25, 1640, 100, 12.5, torus=2),
        Chip("tpu7x", 189.5, 7380, 100, 12.5, torus=3),
        # 80 GB, minus what the driver reserves.
        Chip("h100", 79.1, 3350, 450, 50, torus=0),
    )
}

_TWO_D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_THREE_D = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
    "16x16x16",
)
_GPUS = tuple(str(n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024))
_GPUS_OF_A_NODE = 8
SHAPES = {
    "v4": _THREE_D,
    "v5e": _TWO_D,
    "v5p": (*_THREE_D, "16x16x24"),
    "v6e": _TWO_D,
    "tpu7x": _THREE_D,
    "h100": _GPUS,
}

# The target that XLA compiles for without a GPU, from NVIDIA's H100 tuning guide and data sheet.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84934656000
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Topology(NamedTuple):
    """A chip and the `shape` of one slice: its torus, or (GPUs,)."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name on the command line."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which axes of the torus are rings.

        Those of length 16 on v5e and v6e, and all of a 3-D slice that consists of 4x4x4 cubes.
        """
        if self.chip.torus == 2:
            return tuple(n == 16 for n in self.shape)
        return (all(n % 4 == 0 for n in self.shape),) * self.chip.torus

    @property
    def compiler_options(self) -> dict[str, str | bool]:
        """Options to compile without the device: GPU kernels cannot be timed."""
        if self.chip.torus:
            return {}
        return {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}

    def larger(self) -> list["Topology"]:
        """Larger topologies of the same chip, in order."""
        every = (parse_topology(f"{self.chip.name}:{shape}") for shape in SHAPES[self.chip.name])
        return [each for each in every if each.chips > self.chips]


def parse_topology(name: str) -> Topology:
    """Parse 'v5e:16x16' or 'h100:128'. Raises UserError with the known names."""
    generation, _, shape = name.partition(":")
    if generation not in CHIPS:
        raise UserError(
            f"topology {name!r}: unknown chip {generation!r}.{nearest(generation, CHIPS)}"
            f" Expected CHIP:SHAPE such as 'v5e:16x16' or 'h100:8', with a chip of"
            f" {', '.join(CHIPS)}."
        )
    if shape not in SHAPES[generation]:
        raise UserError(
            f"topology {name!r}: {generation} has no shape {shape!r}."
            f"{nearest(shape, SHAPES[generation])} Known:"
            f" {', '.join(f'{generation}:{each}' for each in SHAPES[generation])}."
        )
    return Topology(CHIPS[generation], tuple(int(n) for n in shape.split("x")))


def devices(topology: Topology, slices: int = 1) -> list[jax.Device]:
    """Return devices to compile for, on which nothing can run; the CPU stays JAX's backend.

    Raises UserError if the compiler for them is not installed.
    """
    jax.config.update("jax_platforms", "cpu")
    if not topology.chip.torus:
        return _gpus(topology, slices)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"topology {topology.name!r} is compiled by libtpu, which is not installed (no TPU is"
            f" needed): pip install 'jax[tpu]=={jax.__version__}'"
        )
    # libtpu is loaded below and reads these variables. Without them it asks Google Cloud what
    # machine this is, and refuses to start in a second process.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    flat = topology.chip.torus == 2
    options: dict[str, Any] = {
        "chips_per_host_bounds": (1, 1, 1) if topology.chips == 1 else (2, 2, 1),
        "wrap": (*topology.wraps, False) if flat else topology.wraps,
        "num_slices": slices,
    }
    if topology.chip.name in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # the two cores of a chip as one device
    return list(topologies.get_topology_desc(topology.name, "tpu", **options).devices)


def _gpus(topology: Topology, slices: int) -> list[jax.Device]:
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise UserError(
            f"topology {topology.name!r} is compiled by JAX's CUDA plugin, which is not installed"
            " (no GPU is needed): in an environment without libtpu, pip install"
            f" 'jax[cuda12]=={jax.__version__}'"
        )
    node = min(topology.chips, _GPUS_OF_A_NODE)
    described = topologies.get_topology_desc(
        "", "cuda", target_config=_H100, topology=f"1x{slices * topology.chips // node}x{node}"
    )
    return list(described.devices)


def wire_seconds(collective: Collective, placed: Sequence[Any], topology: Topology) -> float:
    """Seconds that the bytes of a collective take on the slowest of its hops, without latency.

    placed: the devices of the mesh, flat. Within a slice, or a node of GPUs, all links that the
    group spans work at the same time: both directions of each axis of the torus that is a ring, one
    direction of other axes. Groups with a stride share their links. Between slices or nodes each
    device sends its share over the network.
    """
    members = [placed[i] for i in collective.group]
    gpus = not topology.chip.torus
    # A single slice's devices have no slice_index.
    islands = len({e.process_index if gpus else getattr(e, "slice_index", 0) for e in members})
    seconds = 0.0
    if islands < len(members):
        rate = GB * (topology.chip.link_gb_s * (1 if gpus else _links(members, topology)))
        seconds = collective.wire_bytes / rate
    if islands > 1:
        inside = len(members) // islands
        across = collective._replace(group=tuple(range(islands)))
        rate = GB * topology.chip.network_gb_s / topology.chip.cores * inside
        seconds = max(seconds, across.wire_bytes / rate)
    return seconds


def _links(members: Sequence[Any], topology: Topology) -> float:
    """The number of one-way links that a group of devices keeps busy."""
    links = 0.0
    for axis, (size, wraps) in enumerate(zip(topology.shape, topology.wraps, strict=True)):
        places = sorted({each.coords[axis] for each in members})
        if len(places) > 1:
            stride = math.gcd(*(b - a for a, b in itertools.pairwise(places)))
            ring = wraps and stride * len(places) == size
            links += (2 if ring else 1) / stride
    return links or math.inf  # the two devices of one chip
