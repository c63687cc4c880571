"""Reading pickles as data: an interpreter in which nothing can be called, and their writer.

A pickle is a program, and Python's own reader runs whatever function it names. This one knows the few opcodes that
checkpoints are made of, and a fixed table of names which it turns into plain values itself: no name is ever imported,
no function ever called, so a hostile file can do no more than be refused. It must not know files or formats.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch

from megatron.utils.errors import CheckpointError


class UnreadableError(CheckpointError):
    """The pickle holds what is not read here; the message says what, without the file's name."""


@dataclass(frozen=True)
class StorageRef:
    """A run of numbers kept outside the pickle, by what the pickle says of it."""

    key: str
    dtype: torch.dtype | None  # None: bytes whose meaning the tensor tells
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor by where it lies in its storage; offset and strides in elements."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """A global that the pickle names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Instance:
    """An object of a class that is not built here: an enum member, a path, a namespace. `values` are its attributes."""

    name: Name
    arguments: tuple[Any, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)


STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (*STORAGES.values(), torch.uint16, torch.uint32, torch.uint64)
}
# Classes whose instances checkpoints of Megatron-LLM hold beside tensors; kept as data.
_INERT = {
    "megatron.model.enums": ("PositionEmbeddingType", "ModelType", "AttnType", "AttnMaskType", "LayerType"),
    "megatron.core.enums": ("ModelType",),
    "megatron.core.transformer.enums": ("AttnBackend", "AttnMaskType", "AttnType", "LayerType"),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"),
    "pathlib._local": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "torch": ("device",),
}


def read_pickle(file: IO[bytes] | bytes) -> Any:
    """The value of the next pickle in a file, which is left behind its end.

    Containers, numbers and texts are themselves, tensors are TensorRef, all else is Instance or Name. Raises
    UnreadableError for what is damaged or is more than data.
    """
    machine = _Machine()
    try:
        for opcode, argument, position in pickletools.genops(file):
            step = _OPCODES.get(opcode.name)
            if step is None:
                raise UnreadableError(f"it uses the pickle opcode {opcode.name} (at byte {position})")
            step(machine, argument)
        (value,) = machine.stack
    except UnreadableError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise UnreadableError(f"its pickle is damaged ({error})") from error
    return value


class _Mark:
    """The place in the stack from which a container's content is taken."""


class _Machine:
    """The stack and memory that a pickle's opcodes work on."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def pop_to_mark(self) -> list[Any]:
        for position in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[position], _Mark):
                items = self.stack[position + 1 :]
                del self.stack[position:]
                return items
        raise ValueError("a container without a beginning")

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError("more is taken than is there")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items


def _push(value: Callable[[Any], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.stack.append(value(argument))


def _collect(make: Callable[[list[Any]], Any], count: int | None = None) -> Callable[[_Machine, Any], None]:
    """Replace the topmost items (None: those above the mark) by what `make` makes of them."""

    def step(machine: _Machine, argument: Any) -> None:
        items = machine.pop_to_mark() if count is None else machine.pop(count)
        machine.stack.append(make(items))

    return step


def _pairs(items: Sequence[Any]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    _set_items(result, items)
    return result


def _set_items(target: Any, items: Sequence[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise ValueError("items are set in what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if key in target:
            raise UnreadableError(f"{key!r} occurs twice in one dictionary")
        target[key] = value


def _extend(target: Any, items: Sequence[Any]) -> None:
    if type(target) is not list:
        raise ValueError("items are added to what is no list")
    target.extend(items)


def _drop(machine: _Machine, argument: Any) -> None:
    machine.pop(1)


def _drop_to_mark(machine: _Machine, argument: Any) -> None:
    machine.pop_to_mark()


def _put(machine: _Machine, argument: Any) -> None:
    machine.memory[len(machine.memory) if argument is None else argument] = machine.stack[-1]


def _append(machine: _Machine, argument: Any) -> None:
    (item,) = machine.pop(1)
    _extend(machine.stack[-1], [item])


def _appends(machine: _Machine, argument: Any) -> None:
    items = machine.pop_to_mark()
    _extend(machine.stack[-1], items)


def _setitem(machine: _Machine, argument: Any) -> None:
    items = machine.pop(2)
    _set_items(machine.stack[-1], items)


def _setitems(machine: _Machine, argument: Any) -> None:
    items = machine.pop_to_mark()
    _set_items(machine.stack[-1], items)


def _global(machine: _Machine, argument: Any) -> None:
    module, _, name = argument.partition(" ")
    machine.stack.append(_known(Name(module, name)))


def _stack_global(machine: _Machine, argument: Any) -> None:
    module, name = machine.pop(2)
    machine.stack.append(_known(Name(str(module), str(name))))


def _known(name: Name) -> Name:
    inert = _INERT.get(name.module, ())
    if name not in _CALLS and name.name not in inert and not _is_torch_word(name):
        raise UnreadableError(f"it names {name}, which weights do not need and which might do anything")
    return name


def _is_torch_word(name: Name) -> bool:
    return name.module in ("torch", "torch.storage") and (name.name in STORAGES or name.name in _DTYPES)


def _reduce(machine: _Machine, argument: Any) -> None:
    name, arguments = machine.pop(2)
    machine.stack.append(_made(name, arguments))


def _new_object(machine: _Machine, argument: Any) -> None:
    name, arguments = machine.pop(2)
    machine.stack.append(_made(name, arguments))


def _made(name: Any, arguments: Any) -> Any:
    """What a known name gives when the pickle asks to call it."""
    if not isinstance(name, Name) or type(arguments) is not tuple:
        raise ValueError("something is called that is no name")
    if name in _CALLS:
        return _CALLS[name](*arguments)
    if name.name in _INERT.get(name.module, ()):
        return Instance(name, arguments)
    raise ValueError(f"{name} is called")


def _build(machine: _Machine, argument: Any) -> None:
    """Give an object its attributes; of what is no object here (an OrderedDict with its own), they are let go."""
    (state,) = machine.pop(1)
    target = machine.stack[-1]
    if isinstance(target, Instance):
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if type(part) is dict:
                target.values.update({str(key): value for key, value in part.items()})


def _persistent(machine: _Machine, argument: Any) -> None:
    (reference,) = machine.pop(1)
    if type(reference) is not tuple or len(reference) < 5 or reference[0] != "storage":
        raise ValueError("it refers to data outside that are no storage")
    kind, key, numel = reference[1], reference[2], reference[4]
    if not isinstance(kind, Name) or not (type(numel) is int and numel >= 0):
        raise ValueError("it refers to a storage of no known kind")
    if len(reference) > 5 and reference[5] is not None:
        raise UnreadableError("it holds views of storages, as only very old files do")
    machine.stack.append(StorageRef(str(key), STORAGES.get(kind.name), numel))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> TensorRef:
    return _tensor_of(storage, storage.dtype, offset, shape, strides)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, gradient: Any, hooks: Any, dtype: Any, *_: Any
) -> TensorRef:
    return _tensor_of(storage, _DTYPES[dtype.name], offset, shape, strides)


def _tensor_of(storage: StorageRef, dtype: torch.dtype | None, offset: Any, shape: Any, strides: Any) -> TensorRef:
    """Check that the tensor lies in its storage, element by element apart."""
    numbers = (offset, *shape, *strides)
    if (
        dtype is None
        or not all(type(number) is int and number >= 0 for number in numbers)
        or len(shape) != len(strides)
    ):
        raise ValueError(f"a tensor of shape {shape} and strides {strides} at {offset}")
    room = storage.numel if storage.dtype is not None else storage.numel // dtype.itemsize
    last = offset + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= room:
        raise ValueError(f"a tensor of shape {shape} and strides {strides} at {offset} in {room} elements")
    if any(extent > 1 and stride == 0 for extent, stride in zip(shape, strides, strict=True)):
        raise UnreadableError(f"a tensor of shape {shape} is stored as one element repeated")
    return TensorRef(storage, dtype, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *others: Any) -> Any:
    return data


def _ordered(*arguments: Any) -> dict[Any, Any]:
    return dict(arguments[0]) if arguments else {}


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """How pickles of protocol 2 hold bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in {encoding!r}")
    return text.encode("latin1")


_CALLS: Mapping[Name, Callable[..., Any]] = {
    Name("collections", "OrderedDict"): _ordered,
    Name("_codecs", "encode"): _encoded,
    Name("torch", "Size"): lambda sizes: tuple(sizes),
    Name("torch._utils", "_rebuild_tensor"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    Name("builtins", "set"): lambda items=(): list(items),
    Name("__builtin__", "set"): lambda items=(): list(items),
}

_itself = _push(lambda argument: argument)
_OPCODES: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, argument: None,
    "FRAME": lambda machine, argument: None,
    "STOP": lambda machine, argument: None,
    "MARK": _push(lambda argument: _Mark()),
    "POP": _drop,
    "POP_MARK": _drop_to_mark,
    "DUP": lambda machine, argument: machine.stack.append(machine.stack[-1]),
    "NONE": _push(lambda argument: None),
    "NEWTRUE": _push(lambda argument: True),
    "NEWFALSE": _push(lambda argument: False),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT", "BINUNICODE"), _itself
    ),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"), _itself),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _itself),
    "EMPTY_DICT": _push(lambda argument: {}),
    "EMPTY_LIST": _push(lambda argument: []),
    "EMPTY_TUPLE": _push(lambda argument: ()),
    "EMPTY_SET": _push(lambda argument: []),  # only its order-free content is lost
    "ADDITEMS": _appends,
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _setitem,
    "SETITEMS": _setitems,
    "DICT": _collect(_pairs),
    "LIST": _collect(list),
    "TUPLE": _collect(tuple),
    "TUPLE1": _collect(tuple, 1),
    "TUPLE2": _collect(tuple, 2),
    "TUPLE3": _collect(tuple, 3),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "BUILD": _build,
    "BINPERSID": _persistent,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, argument: machine.stack.append(machine.memory[argument])
    ),
}
