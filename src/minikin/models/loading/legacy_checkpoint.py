"""The tensors of a PyTorch file (.bin, .pt, .ckpt), read without running it. `convert` runs this on its own.

Such a file is a zip archive with a pickle in it, a program that may do anything when it is unpickled. Here it
is not: `Program` looks at its instructions one by one and knows only those that build names, numbers, lists
and dictionaries; the three calls that PyTorch makes for tensors become a place, a shape and strides in the
archive; any other call is refused. Reading with torch's `weights_only` was no boundary twice
(CVE-2025-32434, CVE-2026-24747).

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
# PyTorch's storages: safetensors' name, bytes a number
KINDS = {
    "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8), "LongStorage": ("I64", 8), "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1), "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}  # fmt: skip
_MADE = {
    "collections OrderedDict": "dict",
    "torch._utils _rebuild_tensor_v2": "tensor",
    "torch._utils _rebuild_parameter": "parameter",
}


class Refused(ValueError):
    """What is not the tensors of a model."""


# what damage shows itself as, in here and in the libraries
DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Symbol:
    """A name that the program speaks of: module and class; never looked up."""

    name: str


@dataclass(frozen=True)
class Storage:
    """An entry of the archive with numbers."""

    kind: str
    entry: str


@dataclass(frozen=True)
class Tensor:
    """Where the numbers of a tensor lie; `start` and `strides` count numbers."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Program:
    """What a pickle would build, without building it. Raises Refused for any instruction but those below."""

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

    # what is put on the stack as it is written
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
        taken = self.stack[at:]
        del self.stack[at:]
        return taken

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _some(self, n: int) -> None:
        taken = [self.stack.pop() for _ in range(n)]
        self.stack.append(tuple(reversed(taken)))

    def _tuple1(self, _: Any) -> None:
        self._some(1)

    def _tuple2(self, _: Any) -> None:
        self._some(2)

    def _tuple3(self, _: Any) -> None:
        self._some(3)

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
        """The state of an object: PyTorch's `_metadata` of a dictionary, which nobody needs."""
        self.stack.pop()
        _as(self.stack[-1], dict)

    def _binpersid(self, _: Any) -> None:
        word, kind, entry, _device, _count = _as(self.stack.pop(), tuple)
        name = _as(kind, Symbol).name.removeprefix("torch ")
        if word != "storage" or name not in KINDS:
            raise Refused(f"it holds numbers of a kind that is not known, {name[:60]}")
        self.stack.append(Storage(name, _as(entry, str)))

    def _reduce(self, _: Any) -> None:
        args, called = _as(self.stack.pop(), tuple), _as(self.stack.pop(), Symbol).name
        made = _MADE.get(called)
        if made is None:
            raise Refused(f"it calls {called[:80]}")
        if made == "dict":
            self.stack.append({})
        elif made == "parameter":
            self.stack.append(_as(args[0], Tensor))
        else:
            storage, start, shape, strides = args[:4]
            sizes = [tuple(_as(n, int) for n in _as(one, tuple)) for one in (shape, strides)]
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
    """The tensors by name; the rest is left out.

    They are in a plain dictionary, under `state_dict` (Lightning), or under `string_to_param` (A1111's
    embeddings, whose one tensor is `emb_params` in safetensors).
    """
    found = _as(program.result, dict)
    if "string_to_param" in found:
        found = {"emb_params" if k == "*" else k: v for k, v in _as(found["string_to_param"], dict).items()}
    found = found.get("state_dict", found)
    named = {k: v for k, v in _as(found, dict).items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not named:
        raise Refused("there are no tensors in it")
    if len(named) > MAX_TENSORS:
        raise Refused(f"it has {len(named)} tensors")
    return named


def convert(source: Path, out: IO[bytes]) -> int:
    """Write the tensors of an archive as safetensors; how many. Raises Refused, any of DAMAGE, OSError."""
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
        found = tensors(Program(archive.read(inside[0])))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, t in found.items():
            kind, width = KINDS[t.storage.kind]
            n = _bytes(t, width, sizes.get(f"{top}data/{t.storage.entry}", 0), name)
            header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [at, at + n]}
            at += n
        if at > 2 * source.stat().st_size:
            raise Refused(f"its tensors would take {at:,} bytes, more than twice the file")
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        out.write(len(text).to_bytes(8, "little") + text)
        for part in _numbers(archive, top, found):
            out.write(part)
    return len(found)


def _bytes(t: Tensor, width: int, have: int, name: str) -> int:
    """What a tensor takes; raises Refused when it reaches out of its entry."""
    if len(t.shape) != len(t.strides) or min((t.start, *t.shape, *t.strides)) < 0:
        raise Refused(f"{name[:80]} has an impossible shape")
    n = math.prod(t.shape)
    last = t.start + sum((size - 1) * step for size, step in zip(t.shape, t.strides, strict=True))
    if n and (last + 1) * width > have:
        raise Refused(f"{name[:80]} reaches out of its numbers")
    return n * width


def _numbers(archive: zipfile.ZipFile, top: str, found: dict[str, Tensor]) -> Iterator[bytes]:
    """The tensors' bytes, in the order of the header; an entry that several share is read once in a row."""
    entry, data = "", b""
    for t in found.values():
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
