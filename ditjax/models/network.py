"""What a network is to the rest of ditjax: one `Network`, defined at the end of its file.

A recipe names it by `config.model.kind`: a module of `ditjax.models`, or a dotted name of yours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.config import FRACTION, Model, key

Array = jax.Array | np.ndarray
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # of config.model.dtype

# Path pattern of a parameter -> the mesh axis of each of its last axes (`parallel/rules.py`).
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]
# (h, what it is given for this block) -> h, after a block: residuals of control, patching, steering
Hook = Callable[[jax.Array, Any], jax.Array]


@dataclass(frozen=True)
class Denoiser(Model):
    """The keys of every network that predicts from a noisy x."""

    label_dropout: float = key(0.1, FRACTION)  # > 0 makes a null label, for guidance


class Conditions(NamedTuple):
    """The doors of a network, each optional: what a sample is conditioned on.

    label i32[B] and vector f[B,D] join the timestep; context f[B,M,D] (context_mask bool[B,M]) is
    attended to; prefix f[B,M,D] are tokens that join the sequence and leave it at the end; channels
    f[B,H,W,C] are concatenated to x. A network raises ValueError for a door that it lacks.
    """

    label: Array | None = None
    vector: Array | None = None
    context: Array | None = None
    context_mask: Array | None = None
    prefix: Array | None = None
    channels: Array | None = None

    def only(self, *doors: str) -> None:
        """Raise ValueError for a condition that is given and is not among `doors`."""
        closed = [d for d, value in self._asdict().items() if value is not None and d not in doors]
        if closed:
            raise ValueError(f"this network has no door for {', '.join(closed)}: only for {doors}")


class Inputs(NamedTuple):
    """One example as a task gives it to its network, and what it wants back."""

    shape: tuple[int, ...]  # (H, W, C)
    out_channels: int
    num_classes: int


class Attention(NamedTuple):
    """What a mesh may split of a network's self-attention.

    `extra` tokens of conditioning join `tokens` in the blocks and leave them after.
    """

    tokens: int
    extra: int
    heads: int
    head_width: int


class Cost(NamedTuple):
    """What a network costs, in closed form, and how it describes itself in a `result.json`.

    `macs` are multiply-accumulates of one forward pass of one example, `repeated_macs` those that
    rematerialisation repeats in a training step.
    """

    name: str  # as in the paper: 'DiT-XL/2'
    parameters: int  # trainable
    macs: int
    repeated_macs: int = 0
    tokens: int = 0
    description: Mapping[str, Any] = {}

    @property
    def gflops(self) -> float:
        """The paper's Gflops: multiply-accumulates of one forward pass / 10⁹."""
        return self.macs / 1e9


def training_flops(macs: int, examples: int) -> float:
    """FLOPs of training on `examples`: forward + backward = 3 forwards, 2 a multiply-accumulate.

    What MFU counts (Chowdhery et al. 2022 App. B): nothing that rematerialisation repeats.
    """
    return 6.0 * macs * examples


def training_gflops(gflops: float, examples: Any) -> Any:
    """Multiply-accumulates / 10⁹ of training: forward + backward = 3 forwards of `gflops` each.

    examples: a number, or f64[n] of them.
    """
    return 3.0 * gflops * examples


class Network(NamedTuple):
    """A network as its file describes it.

    `k` are the keys of `config.model`. `module` makes the Linen module; a denoiser's takes
    (k, inputs, place), `place` being an `embed.Placement`, and applies to (params, x, t,
    Conditions). `cost` is None where no closed form is known. `rules` say where a mesh has its
    parameters. `rates(k)` maps a parameter's path to the multiplier of its learning rate, or is
    None for one rate. `varied` are the keys that `Cost.name` shows, in the order of the name.
    """

    keys: type[Model]
    module: Callable[..., nn.Module]
    cost: Callable[[Any, Inputs], Cost] | None = None
    check: Callable[[Any, Inputs], None] = lambda k, inputs: None
    attention: Callable[[Any, Inputs], Attention | None] = lambda k, inputs: None
    kernel: Callable[[Any], str] = lambda k: "plain"  # of attention: auto, plain, cudnn or flash
    rules: Rules = ()
    rates: Callable[[Any], Callable[[str], float] | None] = lambda k: None
    varied: tuple[str, ...] = ()
