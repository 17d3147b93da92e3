"""What is trained of a network: some of its parameters, or factors or a control branch beside them.

A network's parameters are {'params': tree}. Paths are below 'params', such as
'blocks/attn/qkv/kernel'. The leaves of its blocks have a leading axis of L.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ditjax.errors import UserError, first_few
from ditjax.files.assets import unflatten
from ditjax.parallel.rules import path_of
from ditjax.training.task import Transform


class Choice(NamedTuple):
    """Parameters whose path matches a regular expression; of stacked ones, blocks low <= l < high.

    `stack` is the name of the blocks, and `key` that of the pattern, for errors.
    """

    pattern: str
    stack: str
    key: str
    blocks: tuple[int, ...] = ()

    def of(self, params: Any) -> dict[str, jax.Array]:
        """The chosen leaves, or their blocks, by path. Raises UserError if there are none."""
        flat = _flat(params["params"])
        found = {path: leaf for path, leaf in flat.items() if re.search(self.pattern, path)}
        if not found:
            raise UserError(
                f"config.adapt.{self.key} is {self.pattern!r}, which matches no parameter: expected"
                f" a regular expression of paths such as {first_few(flat)}."
            )
        return {path: self.part(path, leaf) for path, leaf in found.items()}

    def part(self, path: str, leaf: jax.Array) -> jax.Array:
        """The blocks of a stacked leaf. Raises UserError for blocks that it does not have."""
        if not (self.blocks and self._stacked(path)):
            return leaf
        low, high = self.blocks
        if high > len(leaf):
            raise UserError(
                f"config.adapt.blocks is {self.blocks}, and the network has {len(leaf)} blocks:"
                " expected (low, high), the first block and the one after the last."
            )
        return leaf[low:high]

    def put(self, path: str, leaf: jax.Array, part: jax.Array) -> jax.Array:
        """The leaf with other blocks in the place of `part`."""
        if not (self.blocks and self._stacked(path)):
            return part
        low, high = self.blocks
        return jnp.concatenate([leaf[:low], part, leaf[high:]])

    def _stacked(self, path: str) -> bool:
        return path.startswith(f"{self.stack}/")


def partly(choice: Choice) -> Transform:
    """Train some parameters; the others keep their bits."""

    def init(params: Any, key: jax.Array) -> Any:
        return {"params": unflatten(choice.of(params))}

    def join(base: Any, trained: Any) -> Any:
        return {"params": _with(base["params"], trained["params"], choice)}

    return Transform(init, join, join)


def _with(base: Any, trained: Any, choice: Choice) -> Any:
    flat = _flat(base)
    for path, part in _flat(trained).items():
        flat[path] = choice.put(path, flat[path], part)
    return unflatten(flat)


class Factors(NamedTuple):
    """Low-rank factors of linear layers: their rank, scale, layers and initial distribution."""

    layers: Choice
    rank: int
    scale: float
    gaussian: bool = False

    def init(self, params: Any, key: jax.Array) -> dict[str, Any]:
        """A at random and B zero, by layer (`low_rank_delta`).

        A is U(-1/√D, 1/√D), as peft's, or N(0, 1/r²). Raises UserError if there is no layer.
        """
        factors: dict[str, jax.Array] = {}
        for i, (path, kernel) in enumerate(sorted(self.layers.of(params).items())):
            lead, (D, *features) = _split_stack(path, kernel, self.layers.stack)
            S = num_projections(features)
            shape = (*lead, S, D, self.rank)
            each = jax.random.fold_in(key, i)
            layer = path.removesuffix("/kernel")
            if self.gaussian:
                factors[f"{layer}/a"] = jax.random.normal(each, shape) / self.rank
            else:
                factors[f"{layer}/a"] = jax.random.uniform(each, shape, minval=-1.0) * D**-0.5
            rest = features[1:] if S > 1 else features
            factors[f"{layer}/b"] = jnp.zeros((*lead, S, self.rank, *rest), jnp.float32)
        return unflatten(factors)


def _split_stack(
    path: str, kernel: jax.Array, stack: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    count = int(path.startswith(f"{stack}/"))
    return kernel.shape[:count], kernel.shape[count:]


def num_projections(features: Any) -> int:
    """S of a kernel [D, *features]: q, k and v of [D, 3, H, d] have factors of their own."""
    return features[0] if len(features) == 3 else 1


def low_rank(factors: Factors, also: Choice | None = None) -> Transform:
    """LoRA (Hu et al. 2021, Eq. 3): W x + s B A x of every chosen layer, with W frozen.

    The network applies the factors (`embed.Linear`), which have the scale in B. `also` are
    parameters that are trained in full beside them.
    """

    def init(params: Any, key: jax.Array) -> Any:
        trained = {"lora": factors.init(params, key)}
        return trained | ({"params": unflatten(also.of(params))} if also else {})

    def with_also(base: Any, trained: Any) -> Any:
        return _with(base["params"], trained["params"], also) if also else base["params"]

    def join(base: Any, trained: Any) -> Any:
        return {"params": with_also(base, trained), "lora": scaled(trained["lora"], factors.scale)}

    def merge(base: Any, trained: Any) -> Any:
        params = with_also(base, trained)
        return {"params": merged_factors(params, scaled(trained["lora"], factors.scale))}

    return Transform(init, join, merge)


def beside(stack: str, shapes: Callable[[], Any]) -> Transform:
    """Train a control branch (`network.ControlSeam`) beside a network that is frozen.

    `shapes()` are its parameters {'in', 'copies': {'block', 'out'}} as shapes. `copies/block` is
    the first blocks of the stack, and the rest zero: the output is the network's own at first.
    """

    def init(params: Any, key: jax.Array) -> Any:
        control = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes())
        copies = control["copies"]
        blocks = jax.tree.map(
            lambda leaf, copy: leaf[: len(copy)], params["params"][stack], copies["block"]
        )
        return {"control": {**control, "copies": {**copies, "block": blocks}}}

    def join(base: Any, trained: Any) -> Any:
        return {"params": base["params"], "control": trained["control"]}

    def merge(base: Any, trained: Any) -> Any:
        raise UserError(
            "a control branch is a network beside its base, and has no place in it: use its run as"
            " it is, with sample, evaluate or grid."
        )

    return Transform(init, join, merge)


class Held(NamedTuple):
    """Which blocks keep a branch, bool[L], and what it yields in the others, f32[L,D]."""

    keep: jax.Array | np.ndarray
    value: jax.Array | np.ndarray


def without_branches(layers: Mapping[str, str], stack: str) -> Transform:
    """Hold branches of blocks at constants; at zero, the branch is taken out.

    `layers` maps a branch to its last linear layer, a path in a block of the stack. `base` are
    {branch: Held}. Of a block that does not keep it, the layer has no kernel, and the value for
    bias: the branch yields it for every token, before its gate. The other leaves keep their bits.
    """

    def join(base: Any, trained: Any) -> Any:
        flat = _flat(trained["params"])
        for branch, held in base.items():
            kernel, bias = (f"{stack}/{layers[branch]}/{name}" for name in ("kernel", "bias"))
            flat[kernel] = jnp.where(held.keep[:, None, None], flat[kernel], 0)
            flat[bias] = jnp.where(held.keep[:, None], flat[bias], held.value)
        return {**trained, "params": unflatten(flat)}

    return Transform(lambda params, key: params, join, join)


def scaled(factors: Any, scale: float) -> Any:
    """Multiply B by a scale."""
    flat = _flat(factors)
    return unflatten({k: v * scale if k.endswith("/b") else v for k, v in flat.items()})


def merged_factors(params: Any, factors: Any) -> Any:
    """W + A B of every layer that has factors; the other leaves are those of `params`."""
    flat, found = _flat(params), _flat(factors)
    for path in [path for path in found if path.endswith("/a")]:
        layer = path.removesuffix("/a")
        kernel = flat[f"{layer}/kernel"]
        flat[f"{layer}/kernel"] = kernel + low_rank_delta(
            found[path], found[f"{layer}/b"], kernel.shape
        )
    return unflatten(flat)


def low_rank_delta(a: jax.Array, b: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A B as a kernel: a [.., S, D, r], b [.., S, r, *features] -> [.., D, S, *features].

    The product is exact on every backend: it is made once, and a TPU would round it by default.
    """
    b = b.reshape(*a.shape[:-2], a.shape[-1], -1)
    delta = jnp.einsum("...sdr,...srf->...dsf", a, b, precision=lax.Precision.HIGHEST)
    return delta.reshape(shape)


def _flat(tree: Any) -> dict[str, Any]:
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
