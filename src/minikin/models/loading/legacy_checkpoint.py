"""Reader of PyTorch files (.bin, .pt, .ckpt) that does not unpickle them; `convert` runs it in a child process.

A PyTorch file is a zip archive with a pickle: a program that can execute anything when it is unpickled.
`Program` interprets its instructions without executing them: it supports only those that build names, numbers,
lists and dictionaries, turns PyTorch's three calls for tensors into offsets, shapes and strides of archive
entries, and refuses any other call. `torch.load(weights_only=True)` executed code twice (CVE-2025-32434,
CVE-2026-24747), and importing torch would need more memory than the child process may use.

    python -m minikin.models.loading.legacy_checkpoint FILE OUT   # limits on memory, time and handles; no torch
"""

from __future__ import annotations

import json
import math
import pickletools  # the table of instructions; it executes none
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

MAX_PROGRAM = 256 << 20  # bytes; a large model's has one or two MB
MAX_TENSORS = 100_000
# PyTorch's storage class -> safetensors' dtype, bytes per value
KINDS = {
    "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8), "LongStorage": ("I64", 8), "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1), "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}  # fmt: skip
_CALLS = {
    "collections OrderedDict": "dict",
    "torch._utils _rebuild_tensor_v2": "tensor",
    "torch._utils _rebuild_parameter": "parameter",
}


class Refused(ValueError):
    """The file holds anything else than the tensors of a model."""


# exceptions that damaged files cause here and in the libraries
DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Symbol:
    """A module and class that the pickle names; it is never imported."""

    name: str


@dataclass(frozen=True)
class Storage:
    """An archive entry with the values of tensors."""

    kind: str
    entry: str


@dataclass(frozen=True)
class Tensor:
    """A tensor as a view of a storage; `start` and `strides` count values."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Program:
    """Interpreter of a pickle that executes nothing. Raises Refused for instructions other than those below."""

    def __init__(self, code: bytes) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.marks: list[int] = []
        self.result: Any = None
        for op, arg, _ in pickletools.genops(code):
            step = getattr(self, f"_{op.name.lower()}", None)
            if step is None:
                step = self._constant if op.name in _CONSTANTS else None
            if step is None:
                raise Refused(f"it has the instruction {op.name}")
            step(_CONSTANTS.get(op.name, arg))

    def _constant(self, value: Any) -> None:
        self.stack.append(value() if isinstance(value, type) else value)

    def _proto(self, _: Any) -> None:
        pass

    _frame = _proto

    def _stop(self, _: Any) -> None:
        self.result = self.stack.pop()

    # literals are pushed to the stack
    def _binunicode(self, arg: Any) -> None:
        self.stack.append(arg)

    _short_binunicode = _binint = _binint1 = _binint2 = _long1 = _binfloat = _binunicode

    def _global(self, arg: str) -> None:
        self.stack.append(Symbol(arg))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Symbol(f"{module} {name}"))

    def _mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _since_mark(self) -> list[Any]:
        at = self.marks.pop()
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple_of(self, n: int) -> None:
        values = [self.stack.pop() for _ in range(n)]
        self.stack.append(tuple(reversed(values)))

    def _tuple1(self, _: Any) -> None:
        self._tuple_of(1)

    def _tuple2(self, _: Any) -> None:
        self._tuple_of(2)

    def _tuple3(self, _: Any) -> None:
        self._tuple_of(3)

    def _append(self, _: Any) -> None:
        value = self.stack.pop()
        _as(self.stack[-1], list).append(value)

    def _appends(self, _: Any) -> None:
        values = self._since_mark()
        _as(self.stack[-1], list).extend(values)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _as(self.stack[-1], dict)[_as(key, str | int)] = value

    def _setitems(self, _: Any) -> None:
        values = self._since_mark()
        target = _as(self.stack[-1], dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_as(key, str | int)] = value

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binput(self, arg: int) -> None:
        self.memo[arg] = self.stack[-1]

    _long_binput = _binput

    def _binget(self, arg: int) -> None:
        self.stack.append(self.memo[arg])

    _long_binget = _binget

    def _build(self, _: Any) -> None:
        """Ignores the state of an object, such as PyTorch's `_metadata` of a dictionary."""
        self.stack.pop()
        _as(self.stack[-1], dict)

    def _binpersid(self, _: Any) -> None:
        word, kind, entry, _device, _count = _as(self.stack.pop(), tuple)
        name = _as(kind, Symbol).name.removeprefix("torch ")
        if word != "storage" or name not in KINDS:
            raise Refused(f"it holds values of an unknown type, {name[:60]}")
        self.stack.append(Storage(name, _as(entry, str)))

    def _reduce(self, _: Any) -> None:
        args, called = _as(self.stack.pop(), tuple), _as(self.stack.pop(), Symbol).name
        kind = _CALLS.get(called)
        if kind is None:
            raise Refused(f"it calls {called[:80]}")
        if kind == "dict":
            self.stack.append({})
        elif kind == "parameter":
            self.stack.append(_as(args[0], Tensor))
        else:
            storage, start, shape, strides = args[:4]
            sizes = [tuple(_as(n, int) for n in _as(numbers, tuple)) for numbers in (shape, strides)]
            self.stack.append(Tensor(_as(storage, Storage), _as(start, int), *sizes))


_CONSTANTS: dict[str, Any] = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip


def _as(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise Refused(f"it is built otherwise than PyTorch builds it, of a {type(value).__name__}")
    return value


def tensors(program: Program) -> dict[str, Tensor]:
    """The tensors of a program's result by name; everything else is ignored.

    They are in a plain dictionary, under `state_dict` (Lightning), or under `string_to_param` (A1111's
    embeddings, whose tensor is named `emb_params` in safetensors).
    """
    state = _as(program.result, dict)
    if "string_to_param" in state:
        state = {"emb_params" if k == "*" else k: v for k, v in _as(state["string_to_param"], dict).items()}
    state = state.get("state_dict", state)
    by_name = {k: v for k, v in _as(state, dict).items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not by_name:
        raise Refused("there are no tensors in it")
    if len(by_name) > MAX_TENSORS:
        raise Refused(f"it has {len(by_name)} tensors")
    return by_name


def convert(source: Path, out: IO[bytes]) -> int:
    """Write the tensors of an archive as safetensors; returns their number. Raises Refused, DAMAGE, OSError."""
    with zipfile.ZipFile(source) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist()}
        inside = [n for n in sizes if n.rpartition("/")[2] == "data.pkl"]
        if len(inside) != 1:
            raise Refused("it is no file of torch.save")
        if sizes[inside[0]] > MAX_PROGRAM:
            raise Refused(f"its list of tensors has {sizes[inside[0]]:,} bytes")
        top = inside[0].removesuffix("data.pkl")
        if f"{top}byteorder" in sizes and archive.read(f"{top}byteorder") != b"little":
            raise Refused("its numbers are big-endian")
        by_name = tensors(Program(archive.read(inside[0])))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, t in by_name.items():
            kind, width = KINDS[t.storage.kind]
            n = _bytes(t, width, sizes.get(f"{top}data/{t.storage.entry}", 0), name)
            header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [at, at + n]}
            at += n
        if at > 2 * source.stat().st_size:
            raise Refused(f"its tensors would take {at:,} bytes, more than twice the file")
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        out.write(len(text).to_bytes(8, "little") + text)
        for part in _values(archive, top, by_name):
            out.write(part)
    return len(by_name)


def _bytes(t: Tensor, width: int, available: int, name: str) -> int:
    """Size of a tensor in bytes; raises Refused if it exceeds its archive entry."""
    if len(t.shape) != len(t.strides) or min((t.start, *t.shape, *t.strides)) < 0:
        raise Refused(f"{name[:80]} has an impossible shape")
    n = math.prod(t.shape)
    last = t.start + sum((size - 1) * step for size, step in zip(t.shape, t.strides, strict=True))
    if n and (last + 1) * width > available:
        raise Refused(f"{name[:80]} exceeds its archive entry")
    return n * width


def _values(archive: zipfile.ZipFile, top: str, by_name: dict[str, Tensor]) -> Iterator[bytes]:
    """The bytes of each tensor in order; consecutive tensors of one entry read it once."""
    entry, data = "", b""
    for t in by_name.values():
        if not math.prod(t.shape):
            continue
        if t.storage.entry != entry:
            entry, data = t.storage.entry, archive.read(f"{top}data/{t.storage.entry}")
        width = KINDS[t.storage.kind][1]
        flat = np.frombuffer(data, f"u{width}", len(data) // width)[t.start :]
        steps = [width * s for s in t.strides]
        yield np.lib.stride_tricks.as_strided(flat, t.shape, steps, writeable=False).tobytes()


def main(source: str, target: str) -> int:
    """Exit code 3 with one sentence on standard error for what is refused."""
    try:
        with open(target, "wb") as out:
            print(convert(Path(source), out))
    except zipfile.BadZipFile:
        print("it is no archive: a file of PyTorch before 1.6, cut off, or of another program", file=sys.stderr)
        return 3
    except Refused as e:
        print(e, file=sys.stderr)
        return 3
    except DAMAGE as e:
        print(f"it is damaged ({type(e).__name__})", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
