"""Constructors for the classes and functions that the pickle of a PyTorch file may name.

Each makes an inert record of checked arguments. A name that is not in `CALLS` is never called, and
a name that `may_name` does not know is refused.
"""

import mmap
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, Final

import ml_dtypes
import numpy as np

from ditjax.errors import shown
from ditjax.weights import pickles
from ditjax.weights.pickles import Attributes, Global, Node, Ordered, Refusal

_NAMES: Final = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz"
    " float8_e8m0fnu complex128 complex64 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
)
TORCH_DTYPES: Final = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in _NAMES.split()}
STORAGES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
# A stride of 0 repeats an element, so that a file of a kilobyte could claim any shape.
_MAX_REPEATED: Final = 1 << 24


class Storage(Node):
    """Raw bytes of the file that tensors view. The legacy format sets `start` late."""

    def __init__(self, data: mmap.mmap, dtype: np.dtype[Any], count: int, typed: bool) -> None:
        self.data = data
        self.dtype = dtype
        self.count = count
        self.typed = typed
        self.start = -1

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def value(self) -> Any:
        return Tensor(self, self.dtype, 0, (self.count,), (1,)).value()


class Tensor(Node):
    """A view of a storage; offset and strides in elements."""

    def __init__(
        self,
        storage: Storage,
        dtype: np.dtype[Any],
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> None:
        if not isinstance(storage, Storage):
            raise TypeError("not a storage")
        if not all(is_size(number) for number in (offset, *shape, *strides)):
            raise Refusal("holds a tensor with a negative or absurd size, offset or stride")
        if len(shape) != len(strides) or len(shape) > 32:
            raise Refusal(f"holds a tensor of {len(shape)} axes and {len(strides)} strides")
        count = int(np.prod(shape, dtype=object))
        last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        limit = storage.nbytes // dtype.itemsize
        if (count and last >= limit) or offset > limit:
            raise Refusal(
                f"holds a tensor of shape {shape} that reaches element {max(last, offset)} of a"
                f" storage of {limit}: the file is damaged"
            )
        if count > max(limit, _MAX_REPEATED):
            raise Refusal(f"repeats the {limit} elements of a storage {count} times by its strides")
        self.storage = storage
        self.dtype = dtype
        self.offset = offset
        self.shape = shape
        self.strides = strides

    def value(self) -> Any:
        size = self.dtype.itemsize
        if 0 in self.shape:
            empty = np.zeros(self.shape, self.dtype)
            empty.flags.writeable = False
            return empty
        return np.ndarray(
            self.shape,
            self.dtype,
            self.storage.data,
            self.storage.start + self.offset * size,
            tuple(step * size for step in self.strides),
        )


def is_size(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 48


def stored(data: mmap.mmap, kind: object, count: object) -> Storage:
    """The storage of a persistent id's class and element count, not yet placed."""
    if not isinstance(kind, Global) or type(count) is not int or not is_size(count):
        raise TypeError("not a storage")
    if kind.name in UNTYPED:
        return Storage(data, TORCH_DTYPES["uint8"], count, typed=False)
    name = STORAGES.get(kind.name.removeprefix("torch."))
    if name is None:
        raise Refusal(f"keeps tensors in {shown(kind.name)}, which has no NumPy equal")
    return Storage(data, TORCH_DTYPES[name], count, typed=True)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None, metadata: Any = None
) -> Tensor:
    if metadata:  # the bytes are still to be conjugated or negated
        raise Refusal("holds a lazily conjugated or negated tensor: save tensor.resolve_conj()")
    if dtype is None:
        if not storage.typed:
            raise TypeError("untyped")
        dtype = storage.dtype
    return Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _tensor_v1(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    return _tensor(storage, offset, shape, strides)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:
    return _tensor(storage, offset, shape, strides, None, metadata)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    name = dtype.name.removeprefix("torch.")
    if name not in TORCH_DTYPES:
        raise Refusal(f"holds a tensor of {shown(dtype.name)}, which NumPy does not have")
    return _tensor(storage, offset, shape, strides, TORCH_DTYPES[name], metadata)


def _parameter(tensor: Any, grad: Any, hooks: Any, state: Any = None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError("not a tensor")
    return tensor


# NumPy's scalars and arrays, which an optimizer's state or a script's arguments may hold.


class NumpyDtype(Node):
    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", code):
            raise Refusal(f"holds a NumPy array of type {shown(code)}; only numbers are read")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])

    def value(self) -> Any:
        return self.dtype.name


class NumpyArray(Node):
    def __init__(self) -> None:
        self.array: np.ndarray[Any, Any] | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.fill(raw, dtype, shape, "F" if fortran else "C")

    def fill(self, raw: Any, dtype: Any, shape: Any, order: Any) -> "NumpyArray":
        shape = tuple(shape)
        if not all(is_size(size) for size in shape) or type(raw) is not bytes:
            raise TypeError("not an array")
        flat = np.frombuffer(raw, dtype.dtype)
        self.array = flat.reshape(shape, order="F" if order == "F" else "C")
        return self

    def value(self) -> Any:
        if self.array is None:
            raise Refusal("holds a NumPy array without its content")
        return self.array


class NumpyScalar(Node):
    def __init__(self, dtype: Any, raw: Any) -> None:
        if type(raw) is not bytes or len(raw) != dtype.dtype.itemsize:
            raise TypeError("not a scalar")
        self.number = np.frombuffer(raw, dtype.dtype)[0]

    def value(self) -> Any:
        return self.number


def _numpy_reconstruct(kind: Any, shape: Any, code: Any) -> NumpyArray:
    if kind.name != "numpy.ndarray":
        raise Refusal(f"rebuilds {shown(kind.name)} as an array of NumPy")
    return NumpyArray()


def _numpy_frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> NumpyArray:
    return NumpyArray().fill(raw, dtype, shape, order)


def _subclass(function: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
    """A tensor of a subclass, or with attributes, which are dropped."""
    if not isinstance(function, Global) or not function.name.startswith("torch._utils._rebuild_"):
        raise TypeError("not a tensor")
    tensor: Tensor = CALLS[function.name](*arguments)
    return tensor


# Python's own classes.


def _ordered(pairs: Any = ()) -> Ordered:
    items = pairs.items() if isinstance(pairs, dict) else pairs
    return Ordered((pickles.hashable(key), value) for key, value in items)


def _default_dict(factory: Any = None, pairs: Any = ()) -> Ordered:
    if factory is not None and not isinstance(factory, Global):
        raise TypeError("not a factory")
    return _ordered(pairs)


def _attributes(pairs: Any = ()) -> Attributes:
    return Attributes(_ordered(pairs))


def _string(text: Any = "") -> str:
    if type(text) is not str:
        raise TypeError("not a string")
    return text


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    if type(text) is bytes:
        return text
    if encoding not in ("latin1", "latin-1"):
        raise TypeError("not bytes")
    return _string(text).encode("latin1")


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise TypeError("not a complex number")
    return complex(real, imaginary)


def _set(items: Any = ()) -> set[Any]:
    return set(pickles.frozenset_of(items))


def _range(*ends: Any) -> range:
    if not all(type(end) is int and abs(end) < 1 << 48 for end in ends):
        raise TypeError("not a range")
    return range(*ends)


def _size(sizes: Any = ()) -> tuple[int, ...]:
    if not all(is_size(size) for size in sizes):
        raise TypeError("not a size")
    return tuple(sizes)


def _device(kind: Any, index: Any = None) -> str:
    if index is None:
        return _string(kind)
    if not is_size(index):
        raise TypeError("not a device")
    return f"{_string(kind)}:{index}"


def _posix(*parts: Any) -> str:
    return str(pathlib.PurePosixPath(*map(_string, parts)))


def _windows(*parts: Any) -> str:
    return str(pathlib.PureWindowsPath(*map(_string, parts)))


_NOW: Final[dict[str, Callable[..., Any]]] = {
    "torch._utils._rebuild_tensor": _tensor_v1,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.torch_version.TorchVersion": _string,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _ordered,
    "collections.defaultdict": _default_dict,
    "argparse.Namespace": _attributes,
    "types.SimpleNamespace": _attributes,
    "pytorch_lightning.utilities.parsing.AttributeDict": _attributes,
    "pathlib.Path": _posix,
    "pathlib.PosixPath": _posix,
    "pathlib.PurePosixPath": _posix,
    "pathlib.WindowsPath": _windows,
    "pathlib.PureWindowsPath": _windows,
    "builtins.set": _set,
    "builtins.frozenset": pickles.frozenset_of,
    "builtins.complex": _complex,
    "builtins.range": _range,
    "__builtin__.xrange": _range,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "_codecs.encode": _bytes,
    "numpy.dtype": NumpyDtype,
    "numpy._core.multiarray.scalar": NumpyScalar,
    "numpy._core.multiarray._reconstruct": _numpy_reconstruct,
    "numpy._core.numeric._frombuffer": _numpy_frombuffer,
}
# Other names of the same modules, by version of Python and NumPy.
_ALSO: Final = (
    ("builtins.", "__builtin__."),
    ("numpy._core.", "numpy.core."),
    ("pathlib.", "pathlib._local."),
)
# The globals that a file may call, and their constructors here.
CALLS: Final = _NOW | {
    also + name.removeprefix(now): make
    for now, also in _ALSO
    for name, make in _NOW.items()
    if name.startswith(now)
}

# Globals that a file may mention but not call: a defaultdict's factory, an array's class, a
# tensor's type, and classes that training scripts leave in checkpoints as keys or values.
_WORDS: Final = {
    *UNTYPED,
    "numpy.ndarray",
    "torch.bool",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
    # Protocol 2 names the types of Python 3 as Python 2 did.
    "__builtin__.long",
    "__builtin__.unicode",
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in ("list", "dict", "int", "float", "str", "bool", "tuple", "bytes", "set")
    ),
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
}


def may_name(name: str) -> bool:
    """Whether a file may mention a global that it may not call.

    This includes every storage and number type; an unknown one is refused later, more plainly.
    """
    return name in _WORDS or bool(re.fullmatch(r"torch\.(\w+Storage|[a-z]+\d+\w*)", name))


# Modules of the standard library whose classes scripts leave in checkpoints. Others have no place
# in one, and are what hostile files are made of: they are refused, although nothing would be run.
_HELD_MODULES: Final = {
    *("abc", "argparse", "array", "collections", "copy_reg", "copyreg", "dataclasses", "datetime"),
    *("decimal", "enum", "fractions", "functools", "ipaddress", "itertools", "logging", "numbers"),
    *("random", "re", "signal", "string", "time", "types", "typing", "uuid", "zoneinfo"),
}
_HELD_BUILTINS: Final = {
    *("object", "type", "slice", "Ellipsis", "NotImplemented", "NotImplementedType"),
}
_STANDARD: Final = sys.stdlib_module_names | {"__builtin__", "copy_reg", "nt", "commands"}


def may_hold(name: str) -> bool:
    """Whether an object of an unknown class or function is held inert, as `pickles.Unknown`.

    Those of other packages are: nothing of them is imported. Of the standard library, only classes
    that scripts leave in checkpoints.
    """
    module, _, rest = name.partition(".")
    if module in ("builtins", "__builtin__"):
        return rest in _HELD_BUILTINS
    if module in _STANDARD:
        return module in _HELD_MODULES and "." not in rest
    return True
