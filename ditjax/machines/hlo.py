"""The collectives of a compiled program, read from its HLO text.

The compiler's own cost analysis counts the body of a loop only once, hence the text. This is how
the XLA of JAX 0.10 prints it for TPUs and GPUs:
- A scanned stack is a `while`. Its trip count is in the backend config (GPUs, CPUs), or is the
  constant that its condition compares with (TPUs).
- A reduce-scatter on TPUs is an all-reduce in a computation named all-reduce-scatter.
- An asynchronous collective on TPUs is a chain of fusions, each of which repeats it under one
  chain_id; on GPUs it is a `-start` and a `-done`.
- Groups of devices are a list, an iota `[g,n]<=[..]T(..)`, or axes of a `mesh[..]`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVE_KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|branch_computations|called_computations)=\{?([^,}]*)")
_OPERAND = re.compile(r"%([\w.\-]+)")


class Collective(NamedTuple):
    """One collective of a step.

    `payload`, in bytes of one call on one device, is the result of a gather, else the operand.
    """

    kind: str
    payload: float
    group: tuple[int, ...]  # the devices of the first group, as positions in the mesh
    times: int  # calls per step: the product of the trip counts of the enclosing loops
    operands: tuple[int, ...] = ()  # number of elements of each

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends per step with ring algorithms.

        (g-1)/g of what is gathered, scattered or exchanged, twice that for an all-reduce, and all
        of a permute.
        """
        g = len(self.group)
        share = {"collective-permute": 1.0, "all-reduce": 2 * (g - 1) / g}
        return self.times * self.payload * share.get(self.kind, (g - 1) / g)


class Instruction(NamedTuple):
    """A line of HLO: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str  # with their parentheses
    attributes: str

    @property
    def operands(self) -> list[str]:
        return _OPERAND.findall(self.arguments)


class Computation(NamedTuple):
    """A named computation of an HLO module."""

    name: str
    instructions: Mapping[str, Instruction]


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a compiled module on `devices`, in the order of the calls.

    Raises ValueError for a loop whose trip count cannot be read.
    """
    computations, entry = parse_hlo(text)
    seen: set[tuple[str, str, str]] = set()
    return list(_of(computations, entry, 1, entry, devices, seen))


def _of(
    computations: Mapping[str, Computation],
    name: str,
    times: int,
    loop: str,
    devices: int,
    seen: set[tuple[str, str, str]],
) -> Iterator[Collective]:
    """Yield those of a computation and all that it calls; `loop` is the enclosing loop's body."""
    computation = computations[name]
    for each in computation.instructions.values():
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVE_KINDS:
            channel, chain = (_attribute(each, key) for key in ("channel_id", "chain_id"))
            if chain and (loop, channel, chain) in seen:
                continue
            seen.add((loop, channel, chain))
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            group = _group(each, devices)
            if len(group) > 1:
                shapes = [computation.instructions[name].shape for name in each.operands]
                payload = sum(map(shape_bytes, shapes))
                if kind == "all-gather":
                    payload *= len(group)
                sizes = tuple(map(shape_elements, shapes))
                yield Collective(kind, payload, group, times, sizes)
        elif each.opcode == "while":
            body = _attribute(each, "body").lstrip("%")
            count = trip_count(each, computations)
            yield from _of(computations, body, times * count, body, devices, seen)
        elif each.opcode not in ("reduce", "scatter", "sort", "map", "reduce-window"):
            for called in _CALLED.findall(each.attributes):
                for callee in called.split(","):
                    yield from _of(
                        computations, callee.strip().lstrip("%"), times, loop, devices, seen
                    )


def parse_hlo(text: str) -> tuple[dict[str, Computation], str]:
    """Parse HLO text into its computations by name, and the name of the entry."""
    found: dict[str, Computation] = {}
    entry = name = ""
    inside: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, inside = header[2], {}
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            found[name] = Computation(name, inside)
        elif match := _NAME.match(line):
            instruction = _instruction(match[2], line[match.end() :])
            inside[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is not a compiled HLO module")
    return found, entry


def _instruction(name: str, rest: str) -> Instruction:
    """Parse what follows `%name = `: a shape, maybe with parentheses, and a call."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, call = rest[:end], rest[end:].lstrip()
    opening = call.index("(")
    closing = _closing(call, opening)
    return Instruction(name, shape, call[:opening], call[opening:closing], call[closing:])


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"unclosed parenthesis in HLO: {text[:80]!r}")


def shape_bytes(shape: str) -> float:
    """'bf16[1,64]{1,0:T(8,128)}' -> 128.0; the arrays of a tuple are summed."""
    total = 0.0
    for dtype, sizes in _ARRAY.findall(shape):
        digits = re.search(r"\d+", dtype)
        each = _BYTES.get(dtype, int(digits[0]) / 8 if digits else 0)
        total += each * _product(sizes)
    return total


def shape_elements(shape: str) -> int:
    """'bf16[1,64]{1,0}' -> 64; the arrays of a tuple are summed."""
    return sum(_product(sizes) for _, sizes in _ARRAY.findall(shape))


def _product(sizes: str) -> int:
    return math.prod(int(n) for n in sizes.split(",") if n)


def trip_count(loop: Instruction, computations: Mapping[str, Computation]) -> int:
    """How often a `while` runs its body: from the backend config, or `i < constant` from 0."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    condition = computations[_attribute(loop, "condition").lstrip("%")]
    constants = {
        int(each.arguments.strip("()"))
        for each in condition.instructions.values()
        if each.opcode == "constant" and each.shape.startswith(("s32[]", "u32[]", "s64[]"))
    }
    if len(constants) != 1:
        raise ValueError(f"cannot read the trip count of {loop.name} from {condition.name}")
    return constants.pop()


def _attribute(instruction: Instruction, key: str) -> str:
    """The value of `key=value`, unquoted, or ''."""
    match = re.search(rf'\b{key}="?([^,"\s}}]+)', instruction.attributes)
    return match[1] if match else ""


def _group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The first group of devices that communicate with one another."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(n) for n in listed[1].split(","))
    iota = r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?"
    if grouped := re.search(rf"replica_groups={iota}", text):
        ids = _iota(grouped[2] or grouped[1], grouped[3]).reshape(_ints(grouped[1]))
        return tuple(int(n) for n in ids[0])
    if mesh := re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({iota}\))? \{{([^}}]*)\}}", text
    ):
        axes = {n: int(size) for n, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        sizes = ",".join(map(str, axes.values()))
        ids = _iota(mesh[3] or mesh[2] or sizes, mesh[4]).reshape(_ints(sizes))
        return _along(ids, list(axes), mesh[5])
    return tuple(range(devices))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """[a,b]T(1,0): 0, 1, 2, … in the shape (a, b), transposed."""
    ids = np.arange(math.prod(_ints(sizes))).reshape(_ints(sizes))
    return ids.transpose(_ints(order)) if order else ids


def _along(ids: np.ndarray, axes: list[str], named: str) -> tuple[int, ...]:
    """The first group along the named axes; 'a':(m)n is the sub-axis of a of size n after m."""
    index: list[int | slice] = [0] * len(axes)
    shape = list(ids.shape)
    for axis, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named):
        place = axes.index(axis)
        if not size:
            index[place] = slice(None)
            continue
        after = shape[place] // (int(before) * int(size))
        index[place] = slice(0, int(size) * after, after)
    return tuple(int(n) for n in ids[tuple(index)].reshape(-1))
