"""Damaged copies of valid concept files, by the hundred thousand: what a parser must survive.

    accepted, wrong = survey(n, seed)

Half of the mutations know the format (header fields, lengths, offsets, keys, numbers), half do not (bits,
bytes, cuts, blocks moved). All are drawn from one seed, so a failure repeats.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence

import torch
from fuzz.targets import check_accepted

from minikin.errors import BadConceptFile
from minikin.models.identity import Origin
from minikin.perfusion import concept_file
from minikin.perfusion import strict_safetensors as io
from minikin.perfusion.concept import Concept
from minikin.perfusion.concept_file import to_bytes

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"
ODD = [
    0, 1, 2, 7, 8, 255, 2**16, 2**24, 2**24 + 1, 2**31, 2**32, 2**53, 2**60, 2**63, 2**64, 10**30, -1, -(2**63),
    0.5, 1e308, float("nan"), float("inf"), True, None, "", "0", "x" * 70, [], {}, [[]], [1, 2, 3],
]  # fmt: skip
TEXTS = [
    "", "7", "-1", "1e999", "NaN", "[]", "{}", "[[]]", '[["m.0",16,Infinity]]', '{"beta":NaN,"tau":0.1}',
    '{"beta":1e400,"tau":0.1}', "[" * 500, '{"a":' * 300, "../../etc/passwd", "\x1b[31m", "\u202e", "a\x00b",
    '{"a":["\\u001b[31m\\u202e"]}', "<script>", "=1+1", "gated", "row", "\ud800", "9" * 5000,
    "data:image/jpeg;base64,????",
]  # fmt: skip
NAMES = ["delta", "scale", "i_star", "dual", "word.0", "word.9", "keys", "c_inv", "../x", "", "__metadata__",
         "unet.conv_in", "a" * 99, "delta\x00"]  # fmt: skip
HALVES = [
    b"\xff\x7f",
    b"\x00\x7c",
    b"\x00\xfc",
    b"\xff\xff",
    b"\x00\x00",
    b"\xff\x7b",
]  # NaN, infinities, 65504


def seeds() -> list[bytes]:
    """Small valid files of every kind: gated and row, half and int8, one and two encoders, points, preview."""
    g = torch.Generator().manual_seed(0)
    origin, concepts = Origin("sd1", "f" * 64, "e" * 64, "MIT", "d" * 40), []
    for n in (0, 1, 2):
        for int8 in (False, True):
            gated = n > 0
            direction = torch.randn(6, generator=g) if gated else torch.zeros(1)
            concepts.append(to_bytes(
                Concept(
                    "tom", "cat", "gated" if gated else "value", origin,
                    tuple(torch.randn(2, 4, generator=g) for _ in range(n)), direction, direction,
                    {LAYER: torch.randn(8, generator=g)}, c_hash="c" * 64 if gated else "",
                    recipe={"steps": 3, "mode": "gated"}, preview=b"\xff\xd8jpeg" if int8 else b"",
                ),
                int8=int8,
            ))  # fmt: skip
    return concepts


def mutations(files: Sequence[bytes], n: int, seed: int = 0) -> Iterator[bytes]:
    """`n` damaged copies; now and then one is damaged twice, or not at all in effect."""
    rng = random.Random(seed)
    parts = [split(data) for data in files]
    for _ in range(n):
        k = rng.randrange(len(files))
        if rng.random() < 0.5:
            data = rng.choice(BLIND)(rng, files[k], files)
        else:
            header, body = parts[k]
            data = rng.choice(KNOWING)(rng, header, body)
        yield rng.choice(BLIND)(rng, data, files) if rng.random() < 0.1 and len(data) > 8 else data


def survey(n: int, seed: int = 0) -> tuple[int, list[str]]:
    """How many of `n` damaged files were accepted, and the first things that went wrong."""
    accepted, wrong = 0, []
    for k, data in enumerate(mutations(seeds(), n, seed)):
        try:
            concept = concept_file.from_bytes(data)
        except BadConceptFile:
            continue
        except Exception as e:
            wrong.append(f"{k}: {type(e).__name__}: {e}")
        else:
            accepted += 1
            try:
                check_accepted(data, concept)
            except Exception as e:
                wrong.append(f"{k}: accepted, but {type(e).__name__}: {e}")
        if len(wrong) >= 5:
            break
    return accepted, wrong


def split(data: bytes) -> tuple[str, bytes]:
    """The header's JSON and the body."""
    (n,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + n].decode(), data[8 + n :]


def joined(header: str | bytes, body: bytes, n: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw) if n is None else n % 2**64) + raw + body


# ---- that know nothing of the format ----------------------------------------------------------------


def _flip(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _byte(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _cut(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data))]


def _more(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 40))


def _moved(rng: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    a, b = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    c = rng.randrange(len(data))
    rest = data[:a] + data[b:]
    return rest[:c] + data[a:b] + rest[c:]


def _spliced(rng: random.Random, data: bytes, files: Sequence[bytes]) -> bytes:
    other = rng.choice(files)
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


BLIND: tuple[Callable[[random.Random, bytes, Sequence[bytes]], bytes], ...] = (
    _flip, _flip, _byte, _cut, _more, _moved, _spliced,
)  # fmt: skip


# ---- that know it -----------------------------------------------------------------------------------


def _length(rng: random.Random, header: str, body: bytes) -> bytes:
    return joined(
        header, body, rng.choice((0, 1, 2, 9, len(header) - 1, len(header) + 1, 2**16, 2**40, 2**64 - 1))
    )


def _field(rng: random.Random, header: str, body: bytes) -> bytes:
    """An odd value for a tensor's type, shape or place."""
    fields = json.loads(header)
    entry = fields[rng.choice([k for k in fields if k != "__metadata__"])]
    where = rng.choice(("dtype", "shape", "data_offsets", "extra"))
    if where in ("shape", "data_offsets") and rng.random() < 0.7:
        entry[where] = list(entry[where])
        entry[where][rng.randrange(len(entry[where]))] = rng.choice(ODD)
    elif where == "dtype":
        entry[where] = rng.choice(["F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "f16", "F8_E4M3", *ODD])
    elif rng.random() < 0.3:
        entry.pop(where, None)
    else:
        entry[where] = rng.choice(ODD)
    return joined(json.dumps(fields), body)


def _swapped(rng: random.Random, header: str, body: bytes) -> bytes:
    """Two tensors' places, types or shapes exchanged."""
    fields = json.loads(header)
    names = [k for k in fields if k != "__metadata__"]
    a, b, what = rng.choice(names), rng.choice(names), rng.choice(("data_offsets", "shape", "dtype"))
    fields[a][what], fields[b][what] = fields[b][what], fields[a][what]
    return joined(json.dumps(fields), body)


def _text(rng: random.Random, header: str, body: bytes) -> bytes:
    """An odd metadata value, key, or one less."""
    fields = json.loads(header)
    meta = fields["__metadata__"]
    key = rng.choice(list(meta))
    if rng.random() < 0.2:
        del meta[key]
    else:
        meta[key] = rng.choice([*TEXTS, *ODD])
    return joined(json.dumps(fields, ensure_ascii=rng.random() < 0.5), body)


def _renamed(rng: random.Random, header: str, body: bytes) -> bytes:
    fields = json.loads(header)
    fields[rng.choice(NAMES)] = fields.pop(rng.choice([k for k in fields if k != "__metadata__"]))
    return joined(json.dumps(fields), body)


def _twice(rng: random.Random, header: str, body: bytes) -> bytes:
    """A key that occurs twice: somewhere with another value, or at the top with the same one."""
    entries = json.loads(header)
    key = rng.choice(list(entries))
    value = rng.choice(["x", 1, {}, entries[key]])
    at = 1 if value is entries[key] else rng.choice([i + 1 for i, c in enumerate(header) if c == "{"])
    return joined(f'{header[:at]}"{key}":{json.dumps(value)},{header[at:]}', body)


def _numbers(rng: random.Random, header: str, body: bytes) -> bytes:
    """Values that are not finite, or the largest there are."""
    at = rng.randrange(0, max(1, len(body) - 4), 2)
    width = rng.choice((2, 4))
    value = (
        rng.choice(HALVES) if width == 2 else struct.pack("<f", rng.choice((3e38, float("inf"), float("nan"))))
    )
    return joined(header, body[:at] + value + body[at + width :])


def _spelt(rng: random.Random, header: str, body: bytes) -> bytes:
    """The same JSON with blanks, signs, fractions or half characters in places."""
    old, new = rng.choice(((":", " : "), ("0", "-0"), ("0,", "0.0,"), ("{", " {"), ("}", "}\n"),
                           ("cat", "\\ud800"), ("F16", "\\u004616"),
                           ("[0", "[00"), ("]", ",]"), ('"', "'")))  # fmt: skip
    at = rng.choice([i for i in range(len(header)) if header.startswith(old, i)] or [0])
    return joined(header[:at] + new + header[at + len(old) :], body)


KNOWING: tuple[Callable[[random.Random, str, bytes], bytes], ...] = (
    _length, _field, _field, _swapped, _text, _text, _renamed, _twice, _numbers, _spelt,
)  # fmt: skip
assert io.MAX_TENSORS < 1000
