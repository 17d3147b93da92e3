"""The network inside a file: one rule for all formats.

A checkpoint is a tree of mappings, a safetensors file a flat one, and a network is found in either
by the names of its tensors (`marks`), below any keys and any prefix. Its label is the dotted path
to it, without the words that PyTorch's wrappers add:

    {"ema": {"module._orig_mod.x_embedder.proj.weight": ...}}       'ema'
    {"state_dict": {"model.x_embedder.proj.weight": ...}}           'state_dict.model'
    {"x_embedder.proj.weight": ...}                                 ''
"""

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ditjax.errors import UserError, first_few, shown
from ditjax.weights.pickles import Unknown

# Added by DistributedDataParallel, torch.compile, FSDP, checkpoint_wrapper and Lightning.
WRAPPERS = {
    "module",
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
# Of averages and optimizers: no network has a tensor of one value with such a name.
_COUNTERS = {
    *("n_averaged", "num_updates", "updates", "decay", "initted", "num_batches_tracked"),
    *("step", "steps", "global_step", "train_steps", "epoch", "iteration"),
}
_AVERAGED = re.compile(r"(^|_)(ema[0-9]*|swa|avg|average|averaged)(_|$)")
_RAW = re.compile(r"(^|_)(online|raw|non_ema)(_|$)")

Keys = tuple[str, ...]
Marks = Sequence[Sequence[str]]


class FoundNetwork(NamedTuple):
    """The tensors of one network by name, its label, and what lies around it.

    `left` counts the tensors that are not of this network, by where they are. `extra` are the other
    values of a checkpoint, such as a training script's arguments.
    """

    tensors: dict[str, np.ndarray]
    label: str
    left: Counter[str]
    extra: dict[str, Any]


class Candidate(NamedTuple):
    """A network in a mapping of the tree: the names that begin with `prefix`."""

    path: Keys
    prefix: str
    kind: int = 0  # which of the groups of marks it has

    @property
    def label(self) -> str:
        return unwrapped(".".join((*self.path, self.prefix)).strip("."))


def unwrapped(name: str) -> str:
    """A dotted name without the words of wrappers: 'module.a._orig_mod.b' -> 'a.b'."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def is_counter(name: str, value: Any) -> bool:
    """Whether a value beside tensors counts steps and updates, and belongs to no network."""
    number = isinstance(value, int | float) or (isinstance(value, np.ndarray) and value.size == 1)
    return number and name.rpartition(".")[2] in _COUNTERS


def find_network(path: Path, tree: Mapping[Any, Any], which: str, marks: Marks) -> FoundNetwork:
    """The network of a tree that `which` selects: 'ema' (averaged), 'model' (raw) or a label.

    `marks` are tensors that every network has that is searched for, a group for each kind; without
    them, or where none is found, any mapping that holds tensors may be one. Raises UserError if
    there is none, or several to choose from.
    """
    nodes = dict(_mappings(tree))
    candidates = [
        Candidate(at, prefix, kind)
        for at, node in nodes.items()
        for prefix, kind in _prefixes(node, marks).items()
    ]
    candidates = candidates or _unmarked(nodes)
    if not candidates:
        keys = first_few(map(shown, tree), 8) or "nothing"
        raise UserError(
            f"{path} holds no tensors by name: its keys are {keys}; expected a state dict, or one"
            " under 'ema', 'model' or 'state_dict'."
        )
    networks = {each.path for each in candidates}
    if which not in ("ema", "model"):
        candidates += [
            Candidate(at, "") for at in nodes if at not in networks and _holds(nodes[at])
        ]
    chosen = _choose(path, candidates, which)
    beside = [each for each in candidates if each.path == chosen.path and each != chosen]
    others = tuple(each.prefix for each in beside if each.prefix.startswith(chosen.prefix))
    tensors, counters = _take(path, nodes[chosen.path], chosen, others)
    left = _left(tree, chosen, others)
    left.update(counters)
    averages = [name for name, n in left.items() if n > 3 and _AVERAGED.search(name.strip("'"))]
    if which == "ema" and _kind(chosen.label) != "ema" and averages:
        raise UserError(
            f"{path} holds an average in {averages[0]} without the names of its tensors, which is"
            " not read: choose the raw weights with --which=model."
        )
    extra = _rest(tree, {*networks, chosen.path} - {()})
    return FoundNetwork(tensors, chosen.label, left, extra)


def _mappings(tree: Any, at: Keys = ()) -> Iterator[tuple[Keys, Mapping[Any, Any]]]:
    """Every mapping of a tree, by the keys that lead to it; indices of lists are keys."""
    if isinstance(tree, Mapping):
        yield at, tree
    items: Iterable[Any] = ()
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    for key, value in items:
        if isinstance(value, Mapping | list | tuple):
            yield from _mappings(value, (*at, key if isinstance(key, str) else shown(key)))


def _rest(tree: Mapping[Any, Any], networks: Container[Keys], at: Keys = ()) -> dict[Any, Any]:
    """A tree without its networks and tensors."""
    rest = {}
    for key, value in tree.items():
        below = (*at, key if isinstance(key, str) else shown(key))
        if isinstance(value, Mapping) and below not in networks:
            rest[key] = _rest(value, networks, below)
        elif not isinstance(value, Mapping | np.ndarray):
            rest[key] = value
    return rest


def _holds(node: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, np.ndarray) for value in node.values())


def _prefixes(node: Mapping[Any, Any], marks: Marks) -> dict[str, int]:
    """What is before a mark in the names of a mapping, without wrappers -> the kind of the mark."""
    found: dict[str, int] = {}
    for name, value in node.items():
        if isinstance(name, str) and isinstance(value, np.ndarray):
            plain = unwrapped(name)
            for kind, group in enumerate(marks):
                for mark in group:
                    if plain == mark or plain.endswith("." + mark):
                        found[plain[: len(plain) - len(mark)]] = kind
    return found


def _unmarked(nodes: Mapping[Keys, Mapping[Any, Any]]) -> list[Candidate]:
    """The mappings nearest to the root that hold tensors, not counting loose ones."""
    sizes = {
        at: sum(isinstance(value, np.ndarray) for value in node.values())
        for at, node in nodes.items()
        if any(
            isinstance(value, np.ndarray) and not is_counter(str(name), value)
            for name, value in node.items()
        )
    }
    near = {
        at: size
        for at, size in sizes.items()
        if not any(len(at) < len(of) and sizes[of] > size and of[: len(at)] == at for of in sizes)
    }
    depth = min(map(len, near), default=0)
    most = max((size for at, size in near.items() if len(at) == depth), default=0)
    return [Candidate(at, "") for at in near if len(at) == depth and 2 * near[at] >= most]


def _choose(path: Path, candidates: Sequence[Candidate], which: str) -> Candidate:
    by_label: dict[str, Candidate] = {}
    for each in candidates:
        written = ".".join((*each.path, each.prefix))
        by_label[written if each.label in by_label else each.label] = each
    wanted = unwrapped(which)
    if wanted in by_label:
        return by_label[wanted]
    groups: dict[str, list[str]] = {"ema": [], "model": [], "": []}
    for label in by_label:
        groups[_kind(label)].append(label)
    if which == "ema":
        tiers = [groups["ema"], groups[""]]
        # A prefix may be of the module around the network; the release's key is of raw weights.
        (sole, *more) = by_label.values()
        if not more and sole.path != ("model",):
            tiers.append(groups["model"])
    elif which == "model":
        tiers = [groups["model"], groups[""]]
    else:
        tiers = [[label for label in by_label if label.endswith(f".{wanted}")]]
    found = next((tier for tier in tiers if tier), [])
    if len({each.kind for each in candidates}) > 1 and which in groups:
        found = list(by_label)
    if len(found) == 1:
        return by_label[found[0]]
    labels = found or list(by_label)
    none = f" and no {which!r}" if not found else f", and {which!r} may be any of them"
    listed = first_few((shown(label) if label else "tensors" for label in labels), 8)
    raise UserError(f"{path} holds {listed}{none}: choose with --which={labels[0] or 'model'}.")


def _kind(label: str) -> str:
    """'ema' for the label of averaged weights, 'model' for that of raw ones, '' for neither."""
    parts = label.split(".")
    if any(map(_RAW.search, parts)):
        return "model"
    if any(map(_AVERAGED.search, parts)):
        return "ema"
    return "model" if "model" in parts else ""


def _take(
    path: Path, node: Mapping[Any, Any], chosen: Candidate, others: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], Counter[str]]:
    """The tensors of a candidate without prefix and wrappers, and the counters among them."""
    tensors: dict[str, np.ndarray] = {}
    counters: Counter[str] = Counter()
    odd = []
    for key, value in node.items():
        name = unwrapped(key) if isinstance(key, str) else ""
        if isinstance(key, str):
            if not name.startswith(chosen.prefix) or (others and name.startswith(others)):
                continue
            if is_counter(key, value):
                counters[shown(key)] += isinstance(value, np.ndarray)
                continue
            # A training script's arguments beside the tensors.
            if isinstance(value, Mapping) and not any(_holds(each) for _, each in _mappings(value)):
                continue
        if not (isinstance(value, np.ndarray) and isinstance(key, str)):
            odd.append(shown(key) + (f" ({value.name})" if isinstance(value, Unknown) else ""))
            continue
        name = name.removeprefix(chosen.prefix)
        if name in tensors:
            raise UserError(f"{path} holds {shown(name)} twice, inside and outside of a wrapper.")
        tensors[name] = value
    if odd:
        raise UserError(f"{path}: {first_few(odd, 8)} are not tensors: expected tensors by name.")
    return tensors, counters


def _left(tree: Mapping[Any, Any], chosen: Candidate, others: tuple[str, ...]) -> Counter[str]:
    """The number of tensors that are not of the chosen network, by the key that they are below."""
    left: Counter[str] = Counter()

    def walk(value: Any, at: Keys) -> None:
        if isinstance(value, np.ndarray):
            within = at[:-1] == chosen.path
            name = unwrapped(at[-1])
            other = bool(others) and name.startswith(others)
            if within and name.startswith(chosen.prefix) and not other:
                return
            left[shown(name.partition(".")[0] if within else at[0])] += 1
        elif isinstance(value, Mapping):
            for key, child in value.items():
                walk(child, (*at, key if isinstance(key, str) else shown(key)))
        elif isinstance(value, list | tuple | set | frozenset):
            for index, child in enumerate(value):
                walk(child, (*at, str(index)))

    walk(tree, ())
    return left
