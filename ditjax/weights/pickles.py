"""Pickles read as data: an interpreter of pickle opcodes that can neither import nor call.

`pickle.Unpickler` with a `find_class` of our own would not be safe: Python's machine still runs the
`__setstate__`, `__new__`, `extend` and `append` of whatever the file names, resolves extension
codes, allocates a memo table for the largest index in the file (one opcode can ask for 64 GB), and
lets the file decide about memory and recursion. Here a global remains a name: REDUCE, NEWOBJ and
BUILD reach only the constructors that the caller lists, each of which makes an inert record, and
every opcode, copied byte and level of nesting is counted. Opcodes that torch.save of Python 3
cannot write (protocols 0 and 1, INST, OBJ, EXT, PERSID, out-of-band buffers) are refused.
"""

import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Any, ClassVar

from ditjax.errors import shown

# A file of 60,000 tensors stays below these limits. A hostile file ends within seconds and half a
# gigabyte.
MAX_STEPS = 2_000_000
MAX_COPIED = 1 << 26
MAX_NESTING = 100
MAX_LEAVES = 10_000_000

# What odd opcodes and odd arguments of constructors raise. Anything else is a bug here.
DAMAGE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error)

_SCALARS = (str, int, float, complex, bytes, type(None))


class Refusal(Exception):  # noqa: N818
    """Why a file is refused, without its name: the reader adds that and raises UserError."""


@dataclass(frozen=True, slots=True)
class Global:
    """A 'module.name' that a pickle mentions. It is never looked up."""

    name: str


class Node:
    """The record that a constructor makes; `resolve` replaces it by its value."""

    def build(self, state: Any) -> None:
        """Set the state of a BUILD opcode. Most nodes have none."""
        raise Refusal(f"gives a state to {type(self).__name__}, which has none")

    def value(self) -> Any:
        """The plain value that replaces this node."""
        raise NotImplementedError


class Attributes(dict[Any, Any]):
    """An object with attributes, such as an argparse.Namespace: its state becomes its items."""


class Ordered(dict[Any, Any]):
    """An OrderedDict or its like: its attributes, such as `_metadata`, are dropped."""


class Unknown(dict[Any, Any]):
    """An object of a class that is not known, held inert: nothing of it is run.

    The items are its attributes or its own items; '()' holds its constructor's arguments, '[]' what
    was appended to it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class Machine:
    """The pickle in `data` from byte `start` on: `run` returns its object, `position` is its end.

    `calls` maps the 'module.name' of each global that may be called to its constructor; `names`
    decides whether any other global may be mentioned, and `inert` whether objects of it become
    `Unknown`; `persistent` takes the argument of BINPERSID. `roots` are the classes of which the
    whole may be an `Unknown`. Raises Refusal.
    """

    def __init__(
        self,
        data: bytes | mmap,
        start: int = 0,
        end: int | None = None,
        calls: Mapping[str, Callable[..., Any]] | None = None,
        names: Callable[[str], bool] = lambda name: False,
        persistent: Callable[[Any], Any] | None = None,
        inert: Callable[[str], bool] = lambda name: False,
        roots: Collection[str] = (),
    ) -> None:
        self.data = data
        self.position = start
        self.end = len(data) if end is None else end
        self.calls = calls or {}
        self.names = names
        self.persistent = persistent
        self.inert = inert
        self.roots = roots
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self) -> Any:
        """The object of the pickle, with Nodes and Globals in it. `resolve` makes it plain."""
        try:
            for _ in range(MAX_STEPS):
                opcode = self.take(1)
                if opcode == b".":
                    (result,) = self.stack
                    if isinstance(result, Unknown | Global) and not self.may_be_all(result.name):
                        raise _asks_for(result.name)
                    return result
                step = self.OPCODES.get(opcode)
                if step is None:
                    raise Refusal(
                        f"uses pickle opcode {opcode!r}, which torch.save of Python 3 never writes"
                    )
                step(self)
        except DAMAGE as error:
            raise Refusal(
                f"is damaged: its pickle makes no sense near byte {self.position}"
                f" ({type(error).__name__})"
            ) from error
        raise Refusal(f"holds a pickle of more than {MAX_STEPS} steps")

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Their presence is checked before memory is allocated."""
        start = self.position
        if count > self.end - start:
            raise Refusal(f"is cut short: its pickle ends inside an opcode at byte {start}")
        self.position = start + count
        return self.data[start : start + count]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def spend(self, size: int) -> None:
        """Count the bytes that an opcode copies: one memoised argument can be copied many times."""
        self.copied += size
        if self.copied > MAX_COPIED:
            raise Refusal(f"copies more than {MAX_COPIED >> 20} MB of its pickle about")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    # Numbers and strings.

    def signed(self, width: int) -> None:
        raw = self.take(width)
        self.spend(width)
        self.push(int.from_bytes(raw, "little", signed=True))

    def floating(self) -> None:
        self.push(struct.unpack(">d", self.take(8))[0])

    def bytestring(self, width: int) -> None:
        raw = self.take(self.number(width))
        self.spend(len(raw))
        self.push(raw)

    def text(self, width: int) -> None:
        raw = self.take(self.number(width))
        self.spend(len(raw))
        self.push(raw.decode("utf-8", "surrogatepass"))

    # Containers.

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("too few")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Unknown):
            target = target.setdefault("[]", [])
        if type(target) is not list:
            raise TypeError("not a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("not a dict")
        for index in range(0, len(items), 2):
            target[hashable(items[index])] = items[index + 1]

    def add_items(self) -> None:
        items = self.since_mark()
        target = self.stack[-1]
        if isinstance(target, Unknown):
            self.append(items)
            return
        if type(target) is not set:
            raise TypeError("not a set")
        target.update(map(hashable, items))

    # Memo.

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    # Globals and calls.

    def line(self) -> str:
        newline = self.data.find(b"\n", self.position, min(self.end, self.position + 512))
        if newline < 0:
            raise ValueError("no end of line")
        text = self.take(newline - self.position).decode()
        self.position += 1
        return text

    def global_of(self, module: Any, name: Any) -> None:
        if not (type(module) is str and type(name) is str):
            raise TypeError("not a name")
        full = f"{module}.{name}"
        if not self.knows(full) and not self.inert(full):
            raise _asks_for(full)
        self.push(Global(full))

    def may_be_all(self, name: str) -> bool:
        """Whether a pickle may be nothing but a global of this name, or an object of it."""
        return name in self.roots or self.knows(name)

    def knows(self, name: str) -> bool:
        return name in self.calls or self.names(name)

    def global_line(self) -> None:
        module = self.line()
        self.global_of(module, self.line())

    def global_stack(self) -> None:
        name = self.stack.pop()
        self.global_of(self.stack.pop(), name)

    def call(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if type(arguments) is not tuple or not isinstance(function, Global | Unknown):
            raise TypeError("not a call")
        for argument in arguments:
            self.spend(len(argument) if hasattr(argument, "__len__") else 1)
        if isinstance(function, Unknown) or not self.knows(function.name):
            made = Unknown(function.name)
            if arguments:
                made["()"] = arguments
            self.push(made)
            return
        if function.name not in self.calls:
            raise Refusal(f"calls {shown(function.name)}, which may only be named")
        self.push(self.calls[function.name](*arguments))

    def call_keywords(self) -> None:
        keywords = self.stack.pop()
        if type(keywords) is not dict:
            raise TypeError("keywords")
        self.call()
        made = self.stack[-1]
        if keywords and not isinstance(made, Unknown):
            raise TypeError("keywords")
        if keywords:
            made.update(keywords)

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Unknown):
            # Of a class with slots: (attributes or None, those of the slots).
            parts = state if type(state) is tuple and len(state) == 2 else (state,)
            if not all(type(part) is dict or part is None for part in parts):
                parts = ({"state": state},)
            for part in parts:
                self.spend(len(part or ()))
                target.update(part or {})
        elif isinstance(target, Attributes) and type(state) is dict:
            self.spend(len(state))
            target.update(state)
        elif isinstance(target, Node):
            target.build(state)
        elif not (isinstance(target, Ordered) and type(state) is dict):
            raise Refusal(f"gives a state to a {type(target).__name__}")

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise Refusal("refers to tensors outside its pickle")
        self.push(self.persistent(self.stack.pop()))

    OPCODES: ClassVar[dict[bytes, Callable[["Machine"], object]]] = {
        b"\x80": lambda m: check_protocol(m.number(1)),
        b"\x95": lambda m: m.take(8),  # FRAME: a hint for streams
        b"N": lambda m: m.push(None),
        b"\x88": lambda m: m.push(True),
        b"\x89": lambda m: m.push(False),
        b"K": lambda m: m.push(m.number(1)),
        b"M": lambda m: m.push(m.number(2)),
        b"J": lambda m: m.signed(4),
        b"\x8a": lambda m: m.signed(m.number(1)),
        b"\x8b": lambda m: m.signed(m.number(4)),
        b"G": floating,
        b"C": lambda m: m.bytestring(1),
        b"B": lambda m: m.bytestring(4),
        b"\x8e": lambda m: m.bytestring(8),
        b"\x96": lambda m: m.bytestring(8),  # BYTEARRAY8
        b"U": lambda m: m.text(1),  # Python 2's str
        b"T": lambda m: m.text(4),
        b"\x8c": lambda m: m.text(1),
        b"X": lambda m: m.text(4),
        b"\x8d": lambda m: m.text(8),
        b"(": mark,
        b"0": pop,
        b"1": lambda m: m.since_mark(),
        b")": lambda m: m.push(()),
        b"\x85": lambda m: m.tuple_of(1),
        b"\x86": lambda m: m.tuple_of(2),
        b"\x87": lambda m: m.tuple_of(3),
        b"t": lambda m: m.push_made(tuple),
        b"]": lambda m: m.push([]),
        b"a": lambda m: m.append([m.stack.pop()]),
        b"e": lambda m: m.append(m.since_mark()),
        b"}": lambda m: m.push({}),
        b"s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
        b"u": lambda m: m.set_items(m.since_mark()),
        b"\x8f": lambda m: m.push(set()),
        b"\x90": add_items,
        b"\x91": lambda m: m.push_made(frozenset_of),
        b"q": lambda m: m.put(m.number(1)),
        b"r": lambda m: m.put(m.number(4)),
        b"\x94": lambda m: m.put(len(m.memo)),
        b"h": lambda m: m.get(m.number(1)),
        b"j": lambda m: m.get(m.number(4)),
        b"c": global_line,
        b"\x93": global_stack,
        b"R": call,
        b"\x81": call,
        b"\x92": call_keywords,
        b"b": build,
        b"Q": persistent_id,
    }

    def push_made(self, make: Callable[[list[Any]], Any]) -> None:
        items = self.since_mark()
        self.push(make(items))


def check_protocol(protocol: int) -> None:
    if not 2 <= protocol <= 5:
        raise Refusal(f"holds a pickle of protocol {protocol}; torch.save writes 2 to 5")


def _asks_for(name: str) -> Refusal:
    return Refusal(
        f"asks for {shown(name)}, which is not plain data and was not run. If you trust the file,"
        " save its tensors alone in PyTorch: torch.save(model.state_dict(), path)"
    )


def hashable(key: Any) -> Any:
    """Check a key of a dict or set: a scalar, or a flat tuple of scalars.

    Deeper tuples are refused, because hashing them recurses in C without a limit. An unknown
    object, such as a member of an enumeration, becomes its description.
    """
    if isinstance(key, Unknown):
        return f"{key.name}{shown(dict(key))}"
    if isinstance(key, _SCALARS) or type(key) is Global:
        return key
    if type(key) is tuple and all(isinstance(item, _SCALARS) for item in key):
        return key
    raise Refusal(f"uses a {type(key).__name__} as a key")


def frozenset_of(items: Any) -> frozenset[Any]:
    return frozenset(map(hashable, items))


def resolve(root: Any) -> Any:
    """The tree with every Node and Global replaced by its value; dicts of any kind become dict.

    An Unknown stays one, and what it holds of its own parents becomes None. Raises Refusal for any
    other container that holds itself, and for sharing or nesting that would blow up when the tree
    is walked.
    """
    done: dict[int, tuple[Any, int]] = {}
    within: set[int] = set()

    unknown = 0

    def visit(item: Any, depth: int) -> tuple[Any, int]:
        nonlocal unknown
        if type(item) is Global:
            return item.name, 1
        if not isinstance(item, (dict, list, tuple, set, frozenset, Node)):
            return item, 1
        if id(item) in done:
            return done[id(item)]
        if id(item) in within:
            if unknown:
                return None, 1
            raise Refusal("holds a container that contains itself")
        if depth > MAX_NESTING:
            raise Refusal(f"nests its containers more than {MAX_NESTING} deep")
        within.add(id(item))
        unknown += isinstance(item, Unknown)
        leaves = 1
        value: Any
        if isinstance(item, Node):
            value = item.value()
        elif isinstance(item, dict):
            value = Unknown(item.name) if isinstance(item, Unknown) else {}
            for key, child in item.items():
                value[visit(key, depth + 1)[0]], count = visit(child, depth + 1)
                leaves += count
        else:
            children = [visit(child, depth + 1) for child in item]
            leaves += sum(count for _, count in children)
            kind = type(item)
            value = kind(child for child, _ in children)
        if leaves > MAX_LEAVES:
            raise Refusal(f"unfolds to more than {MAX_LEAVES} values")
        within.discard(id(item))
        unknown -= isinstance(item, Unknown)
        done[id(item)] = value, leaves
        return value, leaves

    try:
        return visit(root, 0)[0]
    except DAMAGE as error:
        raise Refusal(f"is damaged: its values make no sense ({type(error).__name__})") from error
