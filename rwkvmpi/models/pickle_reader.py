"""What a pickle of torch.save describes, without executing it: no class is imported, no object is built.

A pickle is a program for a stack machine. The instructions that a dictionary of tensors needs are interpreted
here on plain values; the few callables it names become `TensorRef`s or empty dictionaries. Anything else, and
anything too long, raises `PickleRefused` with the reason.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_STEPS = 500_000  # a model of 61 layers has about 60,000 instructions
_MAX_ITEMS = 1 << 44

_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_REBUILD = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_ORDERED_DICT = "collections.OrderedDict"
_OTHER_TENSORS = {  # callables that mean a tensor, but not a dense one of plain numbers
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor without any values",
    "_rebuild_wrapper_subclass": "a tensor subclass",
    "_rebuild_from_type_v2": "a tensor subclass",
    "_rebuild_tensor_v3": "a tensor of an unusual dtype",
}


class PickleRefused(ValueError):
    """The pickle is not a plain dictionary of tensors; the text is the end of a sentence."""


@dataclass(frozen=True)
class TensorRef:
    """A tensor as the pickle describes it: `shape` and `stride` in items from `first_item` of the storage `key`."""

    key: str
    dtype: str
    storage_items: int
    first_item: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    items: int


class _Mark:
    pass


_MARK = _Mark()


def describe_pickle(code: bytes) -> Any:
    """The value that the pickle describes, of None, bool, int, float, str, tuple, list, dict (with str keys) and
    `TensorRef`. Raises PickleRefused."""
    try:
        return _Machine(code).run()
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise PickleRefused("its data.pkl is damaged; copy or download the file again") from error


class _Machine:
    def __init__(self, code: bytes) -> None:
        self.code = code
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            opcode = self.take(1)
            if opcode == b".":
                if len(self.stack) != 1 or self.position != len(self.code):
                    raise PickleRefused("its data.pkl does not end where it says")
                return self.stack[0]
            step = _STEPS.get(opcode)
            if step is None:
                raise PickleRefused(
                    f"its data.pkl uses the pickle instruction {opcode!r}, which no dictionary of tensors needs"
                )
            step(self)
        raise PickleRefused(f"its data.pkl has more than {MAX_STEPS} instructions")

    def take(self, count: int) -> bytes:
        piece = self.code[self.position : self.position + count]
        if len(piece) != count:
            raise PickleRefused("its data.pkl breaks off; copy or download the file again")
        self.position += count
        return piece

    def unpack(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.code.find(b"\n", self.position, self.position + 256)
        if end < 0:
            raise PickleRefused("its data.pkl is damaged; copy or download the file again")
        text = self.code[self.position : end].decode("ascii")
        self.position = end + 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleRefused("its data.pkl is damaged; copy or download the file again")
        return value

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise PickleRefused("its data.pkl is damaged; copy or download the file again")

    # -- instructions --

    def protocol(self) -> None:
        if (version := self.take(1)[0]) != 2:
            raise PickleRefused(f"its data.pkl has the pickle protocol {version}; torch.save writes protocol 2")

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleRefused("its data.pkl is damaged; copy or download the file again")
        self.push(self.memo[index])

    def text(self) -> None:
        self.push(self.take(self.unpack("<I")).decode("utf-8"))

    def long(self) -> None:
        self.push(int.from_bytes(self.take(self.take(1)[0]), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        keys = items[::2]
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleRefused("its data.pkl is damaged; copy or download the file again")
        # Only strings: hashing what a file made could recurse without end.
        for key in keys:
            if not isinstance(key, str):
                raise PickleRefused(f"a key of its dictionary is of type {type(key).__name__}, not a tensor's name")
        if len(set(keys)) != len(keys) or any(key in target for key in keys):
            raise PickleRefused("a name occurs twice in its dictionary")
        target.update(zip(keys, items[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise PickleRefused("its data.pkl is damaged; copy or download the file again")
        self.stack[-1].extend(items)

    def name_global(self) -> None:
        module, name = self.line(), self.line()
        full = f"{module}.{name}"
        if module == "torch._utils" and name in _OTHER_TENSORS:
            raise PickleRefused(f"it holds {_OTHER_TENSORS[name]}; only dense tensors of plain numbers are read")
        known = full in (_REBUILD, _PARAMETER, _ORDERED_DICT) or (module == "torch" and name in _STORAGES)
        if module == "torch" and name.endswith("Storage") and not known:
            raise PickleRefused(f"it holds a quantised or unusual storage ({full!r}); only plain numbers are read")
        if not known:
            raise PickleRefused(
                f"it would call {full!r} when unpickled, which is no part of a model's weights and could run any code; "
                f"nothing of it was executed"
            )
        self.push(_Global(full))

    def persistent(self) -> None:
        match self.pop():
            case ("storage", _Global(full), str(key), str(), int(items)) if 0 <= items < _MAX_ITEMS:
                dtype = _STORAGES.get(full.removeprefix("torch."))
                if dtype is not None and key.isascii() and len(key) <= 64 and "/" not in key:
                    self.push(_Storage(key, dtype, items))
                    return
        raise PickleRefused("a storage of its tensors is described in an unknown way")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise PickleRefused("its data.pkl is damaged; copy or download the file again")
        if function.name == _ORDERED_DICT and arguments == ():
            self.push({})
        elif function.name == _PARAMETER and len(arguments) == 3 and isinstance(arguments[0], TensorRef):
            self.push(arguments[0])
        elif function.name == _REBUILD:
            self.push(_tensor(arguments))
        else:
            raise PickleRefused(f"it calls {function.name} in an unknown way")

    def build(self) -> None:
        """An OrderedDict from Module.state_dict() carries its attribute _metadata: dropped."""
        self.pop()
        if not isinstance(self.stack[-1], dict):
            raise PickleRefused("its data.pkl is damaged; copy or download the file again")


def _tensor(arguments: tuple[Any, ...]) -> TensorRef:
    match arguments:
        case (_Storage(key, dtype, items), int(first), tuple(shape), tuple(stride), bool(), dict(hooks), *rest):
            plain = not hooks and (not rest or (len(rest) == 1 and (rest[0] is None or rest[0] == {})))
            sizes = (first, *shape, *stride)
            if (
                plain
                and len(shape) == len(stride) <= 8
                and all(type(size) is int and 0 <= size < _MAX_ITEMS for size in sizes)
            ):
                return TensorRef(key, dtype, items, first, shape, stride)
    raise PickleRefused("a tensor in it is described in an unknown way (sizes, strides, hooks or views)")


_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _Machine.protocol,
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"(": lambda m: m.push(_MARK),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.unpack("<B")),
    b"M": lambda m: m.push(m.unpack("<H")),
    b"J": lambda m: m.push(m.unpack("<i")),
    b"G": lambda m: m.push(m.unpack(">d")),
    b"\x8a": _Machine.long,
    b"X": _Machine.text,
    b"q": lambda m: m.put(m.take(1)[0]),
    b"r": lambda m: m.put(m.unpack("<I")),
    b"h": lambda m: m.get(m.take(1)[0]),
    b"j": lambda m: m.get(m.unpack("<I")),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_to_mark()),
    b"s": _Machine.set_item,
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"c": _Machine.name_global,
    b"Q": _Machine.persistent,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
