"""Files and recipes that nobody meant: each is read, or refused in one line, and nothing is run.

    python -m tests.fuzz --files=10000 --configs=10000 --seed=0

Every file and recipe is made from (seed, its number) alone. The files are small real ones of each
format, with bits flipped, pieces cut, doubled or taken from another, lengths and counts made huge,
opcodes and calls put into their pickles, headers rewritten and checksums made right again. While
one is read, Python's own audit events tell of anything run, imported, opened or removed.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from ditjax.config import as_tree, completed, leaf_keys, migrated, read, schema
from ditjax.data.images import open_images
from ditjax.errors import UserError
from ditjax.evaluation import statistics
from ditjax.files import npz
from ditjax.files.atomic import read_json
from ditjax.runs import results, rundir
from ditjax.weights import tensors as weights
from ditjax.weights.torch_file import read_torch, write_torch

GOLDEN = Path(__file__).parent / "goldens" / "torch_file.npz"
SECONDS = 30.0  # for one file on a busy machine; the longest takes a tenth
GROWTH_MB = 1024  # of the process's memory, over all files

# ---- what must not happen


class Hang(BaseException):
    """Raised by the clock: no `except Exception` holds it."""


class Watch:
    """Audit events that reading a file must not cause, while `on`; `seen` has them in words."""

    def __init__(self) -> None:
        self.on, self.seen, self.path = False, [], ""
        sys.addaudithook(self)

    seen: list[str]

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and self._forbidden(event, args):
            self.on = False  # ascii() of an argument may cause events too
            self.seen.append(f"{event} {ascii(args)[:120]}")
            self.on = True

    def during(self, call: Callable[..., object], *arguments: Any) -> None:
        """Calls it, watching."""
        self.on = True
        try:
            call(*arguments)
        finally:
            self.on = False

    def _forbidden(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            writes = isinstance(args[1], str) and set(args[1]) & set("wax+")
            return bool(writes) or (isinstance(args[0], str | bytes) and not self._may(args[0]))
        if event == "import":
            return not str(args[0]).startswith("encodings.")
        if event == "compile":
            return args[1] != "<unknown>"  # ast.parse: NumPy reads a header as a literal
        return event == "exec" or (
            event.startswith(
                (
                    "os.",
                    "subprocess.",
                    "socket.",
                    "shutil.",
                    "ctypes.",
                    "pickle.",
                    "marshal.",
                    "pty.",
                    "webbrowser.",
                    "urllib.",
                    "http.",
                    "ftplib.",
                    "smtplib.",
                    "code.",
                )
            )
            and event not in ("os.listdir", "os.scandir")
        )

    def _may(self, path: str | bytes) -> bool:
        text = os.fsdecode(path)
        # NumPy tokenizes an old header, and Python 3.13 looks for the source of a wrong token by
        # the name that such text has.
        return text.startswith(self.path) or "encodings" in text or text == "<string>"


_WATCH: list[Watch] = []


def watch() -> Watch:
    """The one of this process: a hook cannot be taken away again."""
    if not _WATCH:
        _WATCH.append(Watch())
    return _WATCH[0]


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Hang in the main thread after so long."""

    def stop(*_: object) -> None:
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: Python drops what is raised inside a destructor.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Tally:
    """What became of the inputs; `failures` has a line for each that ended badly."""

    def __init__(self) -> None:
        self.read: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self.slowest = (0.0, "")

    def run(self, kind: str, title: str, call: Callable[[], object]) -> None:
        """One input. A UserError of one line refuses it; anything else raised is a failure."""
        began = time.process_time()
        try:
            with limited(SECONDS):
                call()
            self.read[kind] += 1
        except UserError as error:
            self.refused[kind] += 1
            if len(str(error)) > 20_000:
                self.failures.append(f"{title}: a message of {len(str(error))} characters")
        except Hang as error:
            self.failures.append(f"{title}: {error}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.failures.append(f"{title}: {type(error).__name__}: {ascii(str(error))[:200]}")
        self.slowest = max(self.slowest, (time.process_time() - began, title))


# ---- real files, and attacks


class Call:
    """Pickles as a call: what __reduce__ is for."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


def attacks(canary: Path) -> list[Call]:
    """Calls that would leave the file `canary`, or import a module that is not there."""
    code = f"open({str(canary)!r}, 'w').close()"
    return [
        Call(os.system, f"touch '{canary}'"),
        Call(eval, code),
        Call(exec, code),
        Call(open, str(canary), "w"),
        Call(__import__, "fuzz_canary"),
        Call(subprocess.Popen, ["touch", str(canary)]),
        Call(os.mkdir, str(canary)),
        Call(getattr, Path(canary), "touch"),
    ]


class File(NamedTuple):
    """A file of a kind ('zip', 'legacy', 'pickle', 'safetensors', 'npz', 'json', 'jsonl')."""

    kind: str
    content: bytes
    parts: dict[str, bytes]  # of an archive: its members
    attack: bool


SUFFIX = {
    "zip": ".pt",
    "legacy": ".pt",
    "pickle": ".pt",
    "safetensors": ".safetensors",
    "npz": ".npz",
    "json": ".json",
    "jsonl": ".jsonl",
}


def _parts(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive with right lengths and checksums."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return stream.getvalue()


def real_files(folder: Path, canary: Path) -> list[File]:
    """Some of each format, the attacks among them."""
    files: list[File] = []

    def add(kind: str, content: bytes, attack: bool = False) -> None:
        parts = _parts(content) if kind in ("zip", "npz") else {}
        files.append(File(kind, content, parts, attack))

    rng = np.random.default_rng(0)
    tensors = {"a.weight": rng.random((3, 4), np.float32), "a.bias": np.ones(3, np.float16)}
    write_torch(folder / "x.pt", {"ema": tensors, "args": {"lr": 1e-4, "name": "x"}, "step": 3})
    add("zip", (folder / "x.pt").read_bytes())
    with np.load(GOLDEN) as golden:
        add("zip", golden["zip"].tobytes())
        add("legacy", golden["legacy"].tobytes())
    header = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    for protocol in (2, 4):
        for attack in attacks(canary):
            body = pickle.dumps({"model": [attack]}, protocol)
            parts = {"a/data.pkl": body, "a/byteorder": b"little", "a/version": b"3\n"}
            add("zip", zipped(parts), True)
            add("legacy", b"".join(pickle.dumps(part, 2) for part in header) + body, True)
            add("pickle", body, True)
    for tree in (tensors, {"x": np.arange(5)}):
        add("safetensors", save({k: np.ascontiguousarray(v) for k, v in tree.items()}))
    for save_npz in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save_npz(
            stream,
            mu=np.zeros(4),
            sigma=np.eye(4),
            features=rng.random((6, 4)),
            provenance=np.array('{"a": 1}'),
        )
        add("npz", stream.getvalue())
        stream = io.BytesIO()
        images = rng.integers(0, 256, (5, 4, 4, 3), np.uint8)
        save_npz(stream, arr_0=images, label=np.arange(5))
        add("npz", stream.getvalue())
        stream = io.BytesIO()
        save_npz(stream, arr_0=np.array(attacks(canary), object), mu=np.asfortranarray(images))
        add("npz", stream.getvalue(), True)
    add("json", json.dumps(a_result()).encode())
    add("json", json.dumps({"seed": 0, "train": {"steps": 10}}, indent=1).encode())
    add("jsonl", b"".join(b'{"step": %d, "loss": 0.5, "seconds": 1}\n' % k for k in range(1, 9)))
    return files


def a_result() -> dict[str, Any]:
    """A result.json."""
    return {
        "schema": 1,
        "run": "DiT-S-p2-seed0",
        "params": 5,
        "gflops": 0.5,
        "model": {
            "name": "DiT-S/2",
            "size": "S",
            "depth": 12,
            "width": 384,
            "heads": 6,
            "patch": 2,
            "block": "adaln_zero",
            "tokens": 16,
        },
        "train": {
            "steps": 10,
            "batch_size": 4,
            "images": 40,
            "seconds": 1.5,
            "learning_rate": 1e-4,
            "final_loss": None,
            "seed": 0,
        },
        "sample": {
            "num": 4,
            "sampler": "ddim",
            "steps": 25,
            "eta": 0.0,
            "cfg_scale": 1.0,
            "cfg_channels": "all",
            "seed": 0,
            "seconds": 2,
        },
        "metrics": {"fd_digits": 3.5, "accuracy": None},
        "protocol": {"a": [1, 2]},
        "protocol_hash": "0123456789ab",
        "environment": {"jax": "0.10"},
        "config": {"seed": 0},
    }


# ---- mutation

_OPCODES = (
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"cbuiltins\nopen\n",
    b"c__builtin__\nexec\n",
    b"\x8c\x02os\x8c\x06system\x93",
    b"(S'true'\ntR",
    b"R",
    b"\x81",
    b"\x92",
    b"b",
    b"i",
    b"o",
    b"cfuzz_canary\nx\n",
    b"(ifuzz_canary\nx\n",
    b"Pnone\n",
    b"Q",
    b"\x82\x01",
    b"\x84\xff\xff\xff\x7f",
    b"\x97",
    b"\x98",
    b"(",
    b"t",
    b"]",
    b"}",
    b"u",
    b"s",
    b"a",
    b"e",
    b"0",
    b"1",
    b"2",
    b")",
    b"\x85",
    b"\x87",
    b"h\x00",
    b"j\xff\xff\xff\xff",
    b"r\xff\xff\xff\xff",
    b"q\x00",
    b"\x94",
    b"X\xff\xff\xff\xff",
    b"\x8d" + b"\xff" * 8,
    b"\x8b\xff\xff\xff\x7f",
    b"\x8a\xff" + b"\x7f" * 255,
    b"\x8b\x00\x10\x00\x00" + b"\x7f" * 4096,
    b"N",
    b"\x88",
    b"K\x00",
    b"J\xff\xff\xff\xff",
    b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"\x8f",
    b"\x90",
    b"\x91",
    b"\x80\x05",
    b".",
    b"F1e999\n",
    b"I1\n",
    b"L1L\n",
    b"V\\ud800\n",
    b"S'a'\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n)R",
    b"cargparse\nNamespace\n)\x81",
)
_NUMBERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**47,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def mutated(rng: random.Random, content: bytes, other: bytes, pickles: bool) -> bytes:
    """A copy with one to a dozen changes."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 12))):
        if not made:
            break
        place = rng.randrange(len(made))
        length = min(len(made) - place, rng.choice((1, 2, 4, 8, 30, 200)))
        kind = rng.randrange(12 if pickles else 11)
        if kind <= 1:
            made[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            made[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 3:
            del made[place : place + length]
        elif kind == 4:
            made[place:place] = made[place : place + length] * rng.choice((1, 2, 50))
        elif kind == 5:
            start = rng.randrange(len(other))
            made[place : place + length * rng.randrange(2)] = other[start : start + length]
        elif kind == 6:
            made[place : place + length] = bytes(length)
        elif kind == 7:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice(_NUMBERS) % 256**width
            made[place : place + width] = number.to_bytes(width, order)
        elif kind == 8:
            made[place:place] = rng.randbytes(length)
        elif kind == 9 and rng.random() < 0.3:
            del made[place:]
        elif kind == 10:
            _zip_field(rng, made)
        elif kind == 11:
            made[place:place] = rng.choice(_OPCODES)
    return bytes(made)


def _zip_field(rng: random.Random, made: bytearray) -> None:
    """Another number in a field of a local header, a directory's entry or its end."""
    widths = {
        b"PK\x03\x04": (4, 6, 8, 10, 14, 18, 22, 26, 28),
        b"PK\x01\x02": (4, 8, 10, 16, 20, 24, 28, 30, 32, 34, 42),
        b"PK\x05\x06": (4, 8, 10, 12, 16, 20),
    }
    signature = rng.choice(list(widths))
    places = [i for i in range(len(made)) if made.startswith(signature, i)]
    if places:
        place = rng.choice(places) + rng.choice(widths[signature])
        width = rng.choice((2, 4))
        made[place : place + width] = (rng.choice(_NUMBERS) % 256**width).to_bytes(width, "little")


_HEADERS = (
    "(99999999999,)",
    "(-1,)",
    "(-2, -3)",
    "(0, -5)",
    "(True,)",
    "(1e9,)",
    "()",
    "(2**70,)",
    f"({2**70}, 0)",
    f"({2**62}, 4)",
    "((" * 400,
    "-" * 5000 + "1",
    "[1]",
    "None",
    "'x'",
    "(" * 90,
    "(4,) * 9",
    "__import__('fuzz_canary')",
)
_TYPES = (
    "'<f8'",
    "'|O'",
    "'<f4'",
    "'<U0'",
    "'|V0'",
    "'<U99999999'",
    "'>i8'",
    "'<M8[s]'",
    "[('a', '<f8')]",
    "[('a', '|O')]",
    "[('a', '<f4', (9999, 9999))]",
    "('<f8', (2,))",
    "[]",
    "[()]",
    "3",
    "'x'",
    "''",
)


def _npy(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """An array with another header, or mutated."""
    if rng.random() < 0.5 or not content.startswith(b"\x93NUMPY"):
        return mutated(rng, content, other, pickles=False)
    text = (
        f"{{'descr': {rng.choice(_TYPES)}, 'fortran_order': {rng.choice(('True', 'False', '1'))},"
        f" 'shape': {rng.choice(_HEADERS)}, }}\n"
    ).encode()
    if rng.random() < 0.5:
        length = struct.pack("<H", len(text) % 2**16)
        return b"\x93NUMPY\x01\x00" + length + text + content[128:]
    length = struct.pack("<I", rng.choice((len(text), len(text), 2**32 - 1)))
    return b"\x93NUMPY\x02\x00" + length + text + content[128:]


def any_json(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value of any kind, hostile ones often."""
    kind = rng.randrange(14 if depth < 3 else 10)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind <= 2:
        number = rng.choice((*_NUMBERS, 10**300, 10**400, rng.randrange(-9, 2000)))
        return rng.choice((1, 1, -1)) * number
    if kind <= 4:
        floats = (0.0, -0.0, 1.0, 0.5, 1e-320, 1e-45, 1e38, 1e308, float("nan"), float("inf"))
        return rng.choice((*floats, -float("inf"), rng.uniform(-2, 2)))
    if kind <= 8:
        words = (
            "",
            "a",
            "S",
            "XL",
            "4x96x3",
            "9999x999996x9999",
            "digits",
            "train",
            "train[:10%]",
            "\0",
            "\n",
            "a\nb",
            "\ud800",
            "\x1b[2J",
            "../../etc",
            "/",
            "latents:x",
            "folder:",
            "inception:",
            "250",
            "ddim50",
            "1," * 2000,
            "9" * 5000,
            "x" * 100_000,
            "ddpm",
            "float32",
            "١٢",
        )
        return rng.choice(words)
    if kind == 9:
        return []
    if kind <= 11:
        return [any_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 12:
        deep: Any = 1
        for _ in range(rng.choice((5, 60, 300))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    return {f"k{k}": any_json(rng, depth + 1) for k in range(rng.randrange(3))}


def replaced(rng: random.Random, tree: Any) -> Any:
    """A JSON value with one node replaced, taken out or doubled."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.05:
        return any_json(rng)
    made: Any = tree.copy()
    key: Any = rng.choice(list(made)) if isinstance(made, dict) else rng.randrange(len(made))
    draw = rng.random()
    if draw < 0.08:
        del made[key]
    elif draw < 0.16 and isinstance(made, dict):
        made[rng.choice(("new", f"{key}s", "", "a\nb", "x" * 500))] = made[key]
    elif draw < 0.3:
        made[key] = any_json(rng)
    else:
        made[key] = replaced(rng, made[key])
    return made


def _as_text(value: Any) -> bytes:
    return json.dumps(value).encode()


def _header(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header, of the right length or not."""
    length = int.from_bytes(content[:8], "little")
    text = _as_text(replaced(rng, json.loads(content[8 : 8 + length])))
    said = len(text) if rng.random() < 0.9 else rng.choice(_NUMBERS)
    return struct.pack("<Q", said) + text + content[8 + length :]


def a_file(rng: random.Random, files: list[File]) -> tuple[str, bytes]:
    """(kind, content) of one made from the real ones."""
    kind = rng.choice(
        ("zip", "zip", "zip", "legacy", "pickle", "safetensors", "npz", "npz", "json", "jsonl")
    )
    attack = rng.random() < 0.3
    alike = [each for each in files if each.kind == kind]
    file = rng.choice([each for each in alike if each.attack == attack] or alike)
    other = rng.choice(files).content
    pickled = kind in ("zip", "legacy", "pickle")
    if file.parts and rng.random() < 0.6:
        parts = dict(file.parts)
        name = rng.choice(list(parts))
        if kind == "npz":
            parts[name] = _npy(rng, parts[name], other)
        else:
            name = next(each for each in parts if each.endswith("data.pkl"))
            parts[name] = mutated(rng, parts[name], other, pickles=True)
        compressions = (zipfile.ZIP_STORED,) * 4 + (
            zipfile.ZIP_DEFLATED,
            zipfile.ZIP_BZIP2,
            zipfile.ZIP_LZMA,
        )
        content = zipped(parts, rng.choice(compressions))
        return kind, content if rng.random() < 0.8 else mutated(rng, content, other, pickled)
    if kind == "safetensors" and rng.random() < 0.6:
        return kind, _header(rng, file.content)
    if kind == "json" and rng.random() < 0.7:
        return kind, _as_text(replaced(rng, json.loads(file.content)))
    return kind, mutated(rng, file.content, other, pickled)


# ---- reading


def read_file(kind: str, path: Path) -> None:
    """By every reader of its kind. Raises UserError where all of them refuse it."""
    readers: dict[str, list[Callable[[], Any]]] = {
        "torch": [lambda: _tensors(path), lambda: read_torch(path)],
        "safetensors": [lambda: _tensors(path)],
        "npz": [
            lambda: statistics.load_statistics(path),
            lambda: statistics.load_features(path),
            lambda: results.load_samples(path),
            lambda: results.load_samples(path, 2),
            lambda: list(open_images(path).batches(2)),
            lambda: npz.load_array(path, "label"),
        ],
        "json": [
            lambda: results.read_result(path),
            lambda: read_json(path),
            lambda: read(migrated(rundir.read_recipe(path.parent))),
        ],
        "jsonl": [lambda: results.read_metrics(path)],
    }
    refused = [_refusal(reader) for reader in readers.get(kind, readers["torch"])]
    if None not in refused:
        raise UserError(str(refused[0]))


def _tensors(path: Path) -> None:
    """Their first elements, and what they are told when a network expects others."""
    found = weights.read_tensors(path)
    for tensor in found.tensors.values():
        tensor.reshape(-1)[:1].tobytes()
    with contextlib.suppress(UserError):
        expected = {"a.weight": (3, 4), "a.bias": (3,)}
        weights.check_tensors(path, "network", found.tensors, expected)


def _refusal(reader: Callable[[], Any]) -> UserError | None:
    try:
        reader()
    except UserError as error:
        return error
    return None


def fuzz_files(count: int, seed: int, told: Callable[[int], None] = lambda done: None) -> Tally:
    """Reads so many files. `failures` also tells of code that ran and of memory that was taken."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="ditjax-fuzz-") as name:
        folder, canary = Path(name).resolve(), Path(name).resolve() / "canary"
        files = real_files(folder, canary)
        for k, file in enumerate(files):  # what is imported late, is imported here
            path = _written(folder, file.kind, file.content)
            call = functools.partial(read_file, file.kind, path)
            tally.run(f"{file.kind}, whole", f"real file {k}", call)
        watched = watch()
        watched.path, watched.seen = str(folder), []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for k in range(count):
            rng = random.Random(f"{seed} {k}")
            kind, content = a_file(rng, files)
            path = _written(folder, kind, content)
            title = f"file {k} of seed {seed} ({kind})"

            tally.run(kind, title, functools.partial(watched.during, read_file, kind, path))
            for line in watched.seen:
                tally.failures.append(f"{title}: {line}")
            watched.seen = []
            if canary.exists():
                tally.failures.append(f"{title}: code was run")
                break
            told(k + 1)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if grown > GROWTH_MB:
            tally.failures.append(f"memory grew by {grown:.0f} MB")
    return tally


def _written(folder: Path, kind: str, content: bytes) -> Path:
    name = "config" if kind == "json" else "file"
    path = folder / f"{name}{SUFFIX[kind]}"
    path.write_bytes(content)
    return path


# ---- recipes


def a_recipe(rng: random.Random, recipes: list[dict[str, Any]]) -> Any:
    """A recipe with one to four nodes replaced."""
    made: Any = rng.choice(recipes)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if rng.random() < 0.5 and isinstance(made, dict):
            made = _leaf_replaced(rng, made)
        else:
            made = replaced(rng, made)
    return made


def _leaf_replaced(rng: random.Random, recipe: dict[str, Any]) -> dict[str, Any]:
    """By a value that is often of the right type."""
    *groups, leaf = rng.choice(leaf_keys(schema())).split(".")
    made = dict(recipe)
    node: Any = made
    for group in groups:
        if not isinstance(node.get(group), dict):
            return made
        node[group] = dict(node[group])
        node = node[group]
    old = node.get(leaf)
    near: list[Any] = [any_json(rng)]
    if isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 1e300:
        near += [old * 2, old + 1, -old, old * 10**9, 1, 2, 3, 64, float(old)]
    if isinstance(old, bool):
        near += [not old] * 4
    node[leaf] = rng.choice(near)
    return made


def try_recipe(recipe: Any) -> None:
    """As a command does before it compiles; a Config comes back from its own JSON."""
    c = read(migrated(recipe)) if isinstance(recipe, dict) else read(recipe)
    again = json.loads(json.dumps(as_tree(c)))
    if read(again) != c:
        raise AssertionError("a recipe is another after a round trip")


def real_recipes() -> list[dict[str, Any]]:
    """Those of experiments/, as JSON has them."""
    from experiments import base, digits, digits_latent, imagenet256

    configs = [
        base.get_config(),
        digits.get_config(),
        digits_latent.get_config(),
        digits_latent.get_config("autoencoder"),
        imagenet256.get_config(),
    ]
    # Every key is named, so that any may be replaced.
    return [json.loads(json.dumps(completed(config.to_dict()))) for config in configs]


def fuzz_configs(count: int, seed: int, told: Callable[[int], None] = lambda done: None) -> Tally:
    """Reads so many recipes."""
    tally, recipes = Tally(), real_recipes()
    for recipe in recipes:
        tally.run("recipe, whole", "real recipe", functools.partial(try_recipe, recipe))
    for k in range(count):
        recipe = a_recipe(random.Random(f"{seed} {k}"), recipes)
        title = f"recipe {k} of seed {seed}"
        tally.run("recipe", title, functools.partial(try_recipe, recipe))
        told(k + 1)
    return tally


# ---- the long form


def table(tally: Tally) -> str:
    """Kinds with their counts, and the failures."""
    kinds = sorted({*tally.read, *tally.refused})
    rows = [f"{'':<20} {'read':>8} {'refused':>8}"]
    rows += [f"{kind:<20} {tally.read[kind]:>8} {tally.refused[kind]:>8}" for kind in kinds]
    total = f"{'all':<20} {tally.read.total():>8} {tally.refused.total():>8}"
    seconds, title = tally.slowest
    end = f"slowest {seconds:.2f} s ({title}); failures: {len(tally.failures)}"
    return "\n".join([*rows, total, end, *tally.failures[:50]])


def _counter(what: str, total: int) -> Callable[[int], None]:
    began = time.monotonic()

    def told(done: int) -> None:
        if sys.stderr.isatty() or done % 1000 == 0 or done == total:
            rate = done / max(time.monotonic() - began, 1e-9)
            end = "\r" if sys.stderr.isatty() and done < total else "\n"
            print(f"{what} {done}/{total}, {rate:.0f}/s  ", end=end, file=sys.stderr, flush=True)

    return told


def main(argv: list[str]) -> int:
    """Prints a table; 1 when anything ended badly."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--configs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    failed = 0
    for what, fuzz, count in (
        ("files", fuzz_files, args.files),
        ("configs", fuzz_configs, args.configs),
    ):
        began = time.monotonic()
        tally = fuzz(count, args.seed, _counter(what, count))
        print(f"{count} {what} of seed {args.seed} in {time.monotonic() - began:.0f} s")
        print(table(tally))
        failed += len(tally.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
