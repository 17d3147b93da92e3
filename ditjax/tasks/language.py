"""Layers of a language model inside a denoiser: the keys of `config.lm`, and the weights."""

import functools
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from ditjax.config import PATH, Config, Section, check_used, key
from ditjax.errors import UserError, one_line
from ditjax.models.frozen import LM, LanguageLayers
from ditjax.models.network import Network
from ditjax.parallel.processes import is_primary
from ditjax.runs import opening
from ditjax.training.task import Frozen
from ditjax.weights.language import LoadedLayers, load_layers

DRAWN_MODES = ("random", "permuted")  # whose frozen layers depend on the seed
_ON = ("mode", ("mapper", "frozen", "random", "permuted", "unfrozen", "released"))


@dataclass(frozen=True)
class LanguageModel(Section):
    """Layers of a language model behind the last block of a denoiser (`models/frozen.py`)."""

    # frozen: as they are; random: of the same deviations; permuted: their own rows in another
    # order; unfrozen: trained from them; mapper: W1 and W2 alone; released: as LLMDiff's release
    mode: Literal["none", "mapper", "frozen", "random", "permuted", "unfrozen", "released"] = key(
        "none"
    )
    path: str = key("", PATH, used_if=_ON)  # a folder of transformers or LLaMA's, or a GGUF file
    layers: tuple[int, ...] = key((14, 16), used_if=_ON)  # the first, and the one behind the last
    residual: bool = key(True, used_if=("mode", _ON[1][:-1]))  # h + f(h), not f(h)

    def check(self, c: Config) -> None:
        changed = (n for n, value in vars(LanguageModel()).items() if getattr(self, n) != value)
        check_used(c, (f"lm.{name}" for name in changed))
        if self.mode == "none":
            return
        if not self.path:
            raise UserError(
                f"config.lm.mode is {self.mode!r} and config.lm.path '': expected a folder of"
                " transformers (BERT or LLaMA) or a GGUF file (docs/nowcasting.md)."
            )
        if len(self.layers) != 2 or not 0 <= self.layers[0] < self.layers[1]:
            raise UserError(
                f"config.lm.layers is {self.layers}: expected the first layer and the one behind"
                " the last, such as (14, 16)."
            )


@functools.lru_cache(maxsize=4)
def _loaded(path: str, first: int, last: int) -> LoadedLayers:
    try:
        return load_layers(path, first, last)
    except UserError as error:
        raise UserError(f"config.lm.path: {error}") from None


def _layers(c: Config) -> LoadedLayers:
    first, last = c.lm.layers
    return _loaded(c.lm.path, first, last)


def language_of(c: Config) -> LanguageLayers | None:
    """The layers in a recipe's network, or None. Their sizes are read from the file."""
    if c.lm.mode == "none":
        return None
    found, released = _layers(c), c.lm.mode == "released"
    residual = c.lm.residual and not released
    return LanguageLayers(found.layers, found.final_norm, c.lm.mode, residual)


def load_language(c: Config, mesh: Mesh) -> Frozen:
    """{"lm": the frozen layers on the mesh}, or {} if there are none."""
    spec = language_of(c)
    if spec is None or not spec.frozen:
        return {}
    found = _layers(c)
    if is_primary():
        print(one_line(f"lm ({c.lm.mode}): {found.account}"), file=sys.stderr, flush=True)
    return {LM: opening.put_on_mesh(_MADE[c.lm.mode](found.params, c.seed), mesh)}


def language_shapes(c: Config) -> Frozen:
    """The frozen layers as shapes, for a step that is only compiled."""
    spec = language_of(c)
    if spec is None or not spec.frozen:
        return {}
    shape = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    return {LM: shape(_layers(c).params)}


def with_layers(frozen: Frozen, variables: Any) -> Any:
    """The variables of a network with its frozen layers, if it has any."""
    return {**variables, LM: {LM: {"layers": frozen[LM]}}} if LM in frozen else variables


def with_initial(c: Config, init: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """An initialiser by key, in which layers that are trained begin as their file has them."""
    if c.lm.mode != "unfrozen":
        return init

    def begun(key: jax.Array) -> Any:
        variables = init(key)
        params = variables["params"]
        block = {**params[LM], "layers": jax.tree.map(jax.numpy.asarray, _layers(c).params)}
        return {**variables, "params": {**params, LM: block}}

    return begun


def _each(
    change: Callable[[np.random.Generator, np.ndarray], np.ndarray], params: Any, seed: int
) -> Any:
    """Change every tensor of every layer by random numbers of (seed, its path, its layer)."""

    def of_leaf(path: Any, leaf: np.ndarray) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        stacked = leaf if name.startswith("['blocks']") else leaf[None]
        streams = [seed, zlib.crc32(name.encode())]
        made = [change(np.random.default_rng([*streams, i]), one) for i, one in enumerate(stacked)]
        return np.stack(made).reshape(leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _random(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Normal numbers with the mean and the deviation of a tensor."""
    return rng.normal(x.mean(), x.std(), x.shape)


def _permuted(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    return rng.permutation(x)


def _released(params: Any) -> Any:
    """LLMDiff's release never loads the final norm, whose scale stays one."""
    ones = {name: jax.tree.map(np.ones_like, params[name]) for name in params if name != "blocks"}
    return {**params, **ones}


# Mode -> the layers of (those of the file, seed)
_MADE: Mapping[str, Callable[[Any, int], Any]] = {
    "frozen": lambda params, seed: params,
    "released": lambda params, seed: _released(params),
    "random": functools.partial(_each, _random),
    "permuted": functools.partial(_each, _permuted),
}


def check_language(c: Config, network: Network) -> None:
    """Raise UserError for what does not go with layers of a language model."""
    if c.lm.mode == "none":
        return
    said = f"config.lm.mode is {c.lm.mode!r}"
    if not network.language:
        raise UserError(f"{said}, and network {c.model.kind!r} has no place for it: choose 'dit'.")
    others = {
        "adapt.kind": c.adapt.kind != "full",
        "reward.method": c.reward.method != "none",
        "sample.guide": bool(c.sample.guide),
        "model.parametrization": getattr(c.model, "parametrization", "standard") != "standard",
    }
    for name, wrong in others.items():
        section, _, leaf = name.partition(".")
        if wrong:
            value = getattr(getattr(c, section), leaf)
            raise UserError(f"{said} and config.{name} {value!r}: leave one of them out.")
