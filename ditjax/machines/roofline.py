"""How fast a training step can be at best: the roofline of products, memory and wires."""

from typing import NamedTuple

from ditjax.models.cost import Shape, forward_macs, training_flops


class Step(NamedTuple):
    """Seconds of one step on one device, each resource at its peak."""

    compute: float
    memory: float
    wires: float

    @property
    def overlapped(self) -> float:
        """Everything runs at once: no step is faster (Williams et al. 2009)."""
        return max(self)

    @property
    def sequential(self) -> float:
        """The products or the memory, then the wires: nothing sent is hidden."""
        return max(self.compute, self.memory) + self.wires


def hardware_flops(s: Shape, images: int, remat: str) -> float:
    """What the devices compute: rematerialization repeats the blocks' forward pass, whole under
    'full', and without its weight products, so attention's two, under 'dots'."""
    L, D, _ = s.size
    tokens = s.tokens + (2 if s.block == "in_context" else 0)
    repeated = {"none": 0, "dots": 2 * L * tokens**2 * D, "full": forward_macs(s)}[remat]
    return training_flops(s, images) + 2.0 * repeated * images


def memory_traffic(state_bytes: float, temporary_bytes: float) -> float:
    """At least: the state and whatever is kept for the backward pass, read and written once."""
    return 2 * (state_bytes + temporary_bytes)


def mfu(flops: float, seconds: float, devices: int, peak: float) -> float:
    """Model FLOPs utilisation: `flops` of a step of all devices by what they could have done."""
    return flops / (seconds * devices * peak)


def fsdp_bytes(parameters: float, group: int, itemsize: int = 2) -> float:
    """What ideal FSDP sends a device a step: 3·itemsize·(g-1)/g a parameter.

    Parameters are gathered for the forward and for the backward pass, gradients reduce-scattered.
    """
    return 3.0 * itemsize * (group - 1) / group * parameters


def all_reduce_bytes(size: float, group: int) -> float:
    """What a ring all-reduce of `size` bytes has a device send: 2·(g-1)/g of them."""
    return 2 * (group - 1) / group * size
