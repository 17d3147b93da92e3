"""The roofline of a training step: products, memory and wires (Williams et al. 2009)."""

from typing import NamedTuple

from ditjax.models.network import NetworkCost, training_flops


class StepTime(NamedTuple):
    """Seconds of one step on one device, for each resource at its peak."""

    compute: float
    memory: float
    wires: float

    @property
    def overlapped(self) -> float:
        """All resources work at the same time: a lower bound."""
        return max(self)

    @property
    def sequential(self) -> float:
        """Products and memory overlap, then come the wires: no communication is hidden."""
        return max(self.compute, self.memory) + self.wires


def hardware_flops(cost: NetworkCost, images: int) -> float:
    """FLOPs that the devices compute for a training step: the model's, and what is repeated."""
    return training_flops(cost.macs, images, cost.passes) + 2.0 * cost.training_macs * images


def memory_traffic(state_bytes: float, temporary_bytes: float) -> float:
    """A lower bound in bytes: the state and the temporaries, each read and written once."""
    return 2 * (state_bytes + temporary_bytes)


def mfu(flops: float, seconds: float, devices: int, peak: float) -> float:
    """Model FLOPs utilisation: `flops` of a step over what all devices could do in its time."""
    return flops / (seconds * devices * peak)


def fsdp_bytes(parameters: float, group: int, itemsize: int = 2) -> float:
    """Bytes that a device sends per step with ideal FSDP: 3·itemsize·(g-1)/g per parameter.

    Parameters are gathered for the forward and the backward pass, gradients reduce-scattered.
    """
    return 3.0 * itemsize * (group - 1) / group * parameters


def all_reduce_bytes(size: float, group: int) -> float:
    """Bytes that a device sends in a ring all-reduce of `size` bytes: 2·(g-1)/g·size."""
    return 2 * (group - 1) / group * size
