"""The interface of a network: the `Network` that its module defines.

A recipe selects it with `config.model.kind`: a module of `ditjax.models`, or your own module by its
dotted name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ditjax.config import FRACTION, Model, key

if TYPE_CHECKING:  # it is made of layers whose file needs this one
    from ditjax.models.frozen import LanguageLayers

AnyArray = jax.Array | np.ndarray
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # of config.model.dtype

# Path pattern of a parameter -> the mesh axis of each of its last axes (`parallel/rules.py`).
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]
# (h, the block's slice of `per_block`) -> h, after each block: for control residuals or steering
Hook = Callable[[jax.Array, Any], jax.Array]


@dataclass(frozen=True)
class Denoiser(Model):
    """The keys of `config.model` that all denoisers share."""

    label_dropout: float = key(0.1, FRACTION)  # > 0 adds a null label, for guidance


class Conditions(NamedTuple):
    """Conditions of a sample, all optional.

    label i32[B] and vector f[B,D] are added to the timestep's embedding; context f[B,M,D], with
    context_mask bool[B,M], is the input of cross-attention; prefix f[B,M,D] are tokens that are
    added to the sequence and removed at the end; channels f[B,H,W,C] are concatenated to x, or read
    by the control branch beside it; interval f32[B] is h = t - r, over which a network of two times
    averages, and None is 0; level [B] is the network's time of the noise in the channels. A network
    raises ValueError for a condition that it does not support.
    """

    label: AnyArray | None = None
    vector: AnyArray | None = None
    context: AnyArray | None = None
    context_mask: AnyArray | None = None
    prefix: AnyArray | None = None
    channels: AnyArray | None = None
    interval: AnyArray | None = None
    level: AnyArray | None = None

    def only(self, *names: str) -> None:
        """Raise ValueError if a condition that is not among `names` is set."""
        wrong = [n for n, value in self._asdict().items() if value is not None and n not in names]
        if wrong:
            raise ValueError(f"this network takes no {', '.join(wrong)}: expected only {names}")


class Context(NamedTuple):
    """The context of `Conditions`: how many tokens of which width."""

    tokens: int = 0
    width: int = 0


class Inputs(NamedTuple):
    """The shape of one example, and the number of output channels and classes.

    `interval`: the network is given a second time, h = t - r. `given`: so many channels are given
    beside x, and with `level` the level of their noise (`Conditions`). `context`: what
    cross-attention reads, and `vector` the width of the condition of that name, 0 for none. `past`:
    so many frames are before those of x, which the channels show. `language`: layers behind the
    last block.
    """

    shape: tuple[int, ...]  # (H, W, C), or (F, H, W, C) of a clip
    out_channels: int
    num_classes: int
    interval: bool = False
    given: int = 0
    level: bool = False
    context: Context = Context()
    vector: int = 0
    past: int = 0
    language: "LanguageLayers | None" = None


class Attention(NamedTuple):
    """The dimensions of a network's self-attention, which a mesh may split.

    The blocks also process `extra` conditioning tokens, which are removed afterwards. With
    `frames`, attention stays within a frame of that many tokens, or within a place of all frames.
    `whole`: it needs every query and key of a head on one device.
    """

    tokens: int
    extra: int
    heads: int
    head_width: int
    frames: int = 1
    whole: bool = False


class NetworkCost(NamedTuple):
    """The cost of a network in closed form, and its description in `result.json`.

    `macs` are the multiply-accumulates of one forward pass of one example, `training_macs` those of
    a training step beyond three forward passes: what rematerialisation repeats, and layers that
    only training evaluates. A step of training is `passes` forward passes: 3, and more if the
    objective differentiates forwards or evaluates the network again. Of these, `drawn` draw the
    images that a reward is given.
    """

    name: str  # as in the paper: 'DiT-XL/2'
    parameters: int  # trainable
    macs: int
    training_macs: int = 0
    tokens: int = 0
    description: Mapping[str, Any] = {}
    passes: float = 3.0
    drawn: float = 0.0

    @property
    def gflops(self) -> float:
        """The paper's Gflops: multiply-accumulates of one forward pass / 10⁹."""
        return self.macs / 1e9

    def with_language(
        self, language: "LanguageLayers | None", tokens: int, width: int
    ) -> "NetworkCost":
        """The cost with the layers of a language model on so many tokens of a width."""
        if language is None:
            return self
        held = language.held() if language.frozen else 0
        return self._replace(
            parameters=self.parameters + language.parameters(width),
            macs=self.macs + language.macs(tokens, width),
            description={**self.description, "lm": language.kind, "lm_frozen": held},
        )


def training_flops(macs: int, examples: int, passes: float = 3.0) -> float:
    """FLOPs of training on `examples`: forward and backward = 3 forwards, 2 FLOPs per MAC.

    As counted by MFU (Chowdhery et al. 2022 App. B): without what rematerialisation repeats.
    passes: of `NetworkCost`.
    """
    return 2.0 * passes * macs * examples


def training_gflops(gflops: float, examples: Any, passes: float = 3.0) -> Any:
    """Multiply-accumulates / 10⁹ of training: forward and backward = 3 forwards of `gflops` each.

    examples: a number, or f64[n]. passes: of `NetworkCost`.
    """
    return passes * gflops * examples


class Branch(NamedTuple):
    """A control branch: how many blocks it copies, its form, and the control's shape (h, w, K)."""

    copies: int
    form: str
    shape: tuple[int, ...]


class ControlSeam(NamedTuple):
    """How a network is controlled, if it has a hook after each block.

    `module(k, inputs, branch, place)` applies to (variables(base, control), x, t, Conditions) ->
    residuals, the `per_block` of the network. `control` are {'in', 'copies'}: `copies/block` is a
    copy of the first blocks of the stack, and all else is zero at first. `check` raises UserError;
    `cost` are the parameters and the multiply-accumulates that are added to the network's.
    """

    module: Callable[..., nn.Module]
    variables: Callable[[Any, Any], Any]
    check: Callable[[Any, Inputs, Branch], None]
    cost: Callable[[Any, Inputs, Branch], tuple[int, int]]


class Taps(NamedTuple):
    """What the blocks of a network computed; what was not asked for is None or empty.

    tokens f[L,B,N,D] after each block; branches: name -> what it yields before its gate,
    f[L,B,N,D]; attention f32[L,B,H,M,M], the weights of self-attention; crossed f32[L,B,H,N,K],
    those of cross-attention to the K tokens of a context. N are the tokens of the image; M counts
    the tokens of conditions behind them, too.
    """

    tokens: jax.Array | None = None
    branches: Mapping[str, jax.Array] = {}
    attention: jax.Array | None = None
    crossed: jax.Array | None = None


class InspectionSeam(NamedTuple):
    """How the blocks of a network are read and changed, if it has a stack of them.

    The first three take (k, inputs, place) and build a function of (variables, x, t, Conditions,
    ..). `read`, with names of fields of `Taps`, -> (prediction, Taps). `patch`, with mask
    bool[L,B or 1,N] and value f[L,B,N,D], -> the prediction with the value in the place of what
    comes out of a block where the mask is set. `lens`, with the tokens [B,N,D] of any block in the
    place of x, -> the prediction of the layers behind the blocks. `branches(k)` maps each branch of
    a block to its last linear layer, a path in the block.
    """

    read: Callable[..., Callable[..., tuple[jax.Array, Taps]]]
    patch: Callable[..., Callable[..., jax.Array]]
    lens: Callable[..., Callable[..., jax.Array]]
    branches: Callable[[Any], Mapping[str, str]]


class Network(NamedTuple):
    """The definition of a network.

    `k` are the keys of `config.model`. `module` builds the Linen module; for a denoiser it takes
    (k, inputs, place), where `place` is an `embed.Placement`, and the module applies to (params, x,
    t, Conditions). `cost` is None if no closed form is known. `rules` are the sharding rules of the
    parameters. `rates(k)` maps a parameter's path to its learning-rate multiplier, or is None if
    all are 1. `varied` are the keys that `NetworkCost.name` shows, in that order. `interval`: the
    module takes the interval of `Conditions`, with `given` channels and their level, and with
    `language` layers of a language model. `clips`: it takes clips f32[B,F,H,W,C], too. `texts`: it
    takes a context with its mask, and no label.

    For fine-tuning, `grafts` are the rules of the leaves that follow the inputs
    (`models/grafting.py`), `adopts` maps other kinds of networks to how this one starts from their
    leaves, `inherited` are the keys that weights were trained with and do not show, and `stack` is
    the name of the blocks, whose leaves have a leading axis of them. `grown(k, factor)` are the
    keys of a network that is about `factor` times as deep and wide, and how many times as wide it
    is exactly; None if there is no such family. `control` is None if the network cannot have a
    control branch, `inspection` if its blocks cannot be read.
    """

    keys: type[Model]
    module: Callable[..., nn.Module]
    cost: Callable[[Any, Inputs], NetworkCost] | None = None
    check: Callable[[Any, Inputs], None] = lambda k, inputs: None
    attention: Callable[[Any, Inputs], Attention | None] = lambda k, inputs: None
    kernel: Callable[[Any], str] = lambda k: "plain"  # of attention: auto, plain, cudnn or flash
    rules: Rules = ()
    rates: Callable[[Any], Callable[[str], float] | None] = lambda k: None
    varied: tuple[str, ...] = ()
    grafts: tuple[tuple[str, Callable[..., Any]], ...] = ()
    adopts: Mapping[str, Callable[..., Any]] = {}
    inherited: tuple[str, ...] = ()
    stack: str = ""
    grown: Callable[[Any, float], tuple[Any, float]] | None = None
    control: ControlSeam | None = None
    inspection: InspectionSeam | None = None
    interval: bool = False
    given: bool = False
    clips: bool = False
    texts: bool = False
    language: bool = False
