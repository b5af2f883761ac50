"""The concept file format: one safetensors file of at most 100 KB.

Tensors:   delta (N,) value differences of all L cross-attention layers, float16, or int8 with scale (L,)
           float32; i_star and dual (D,) float16 in mode "gated"; word.K (n, d_k), word vectors minus the
           category's for each text encoder, float16, or int8 with wordscale.K (n,) float32;
           keys (N,) float16, for concepts whose keys are not locked (an ablation of `minikin compare`).
Metadata:  minikin.* (format, name, category, mode, base, hashes, gate, points, recipe, index) and
           ModelSpec keys, so that other tools show a title, a trigger phrase and a preview.
           The index abbreviates layers: "d0.1" for down_blocks.0.attentions.1, "t" for a transformer.
Not in it: C, locked keys (they depend on the base and the category only), paths, captions, names of photos.

docs/concept-file.md has the sizes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikin import strict_json
from minikin.errors import BadConceptFile, MinikinError
from minikin.files import atomic_write, read_small
from minikin.models.identity import Origin
from minikin.perfusion import operating_points
from minikin.perfusion import strict_safetensors as io
from minikin.perfusion.concept import FILE_MODES, Concept, EditMode
from minikin.perfusion.gate import Gate
from minikin.printable import without_controls

FORMAT = 1
MAX_BYTES = 100_000  # of the file with its preview
MAX_HALF = 40_000  # value differences in float16, which with a gate are near MAX_BYTES; above it, in 8 bits
MAX_VALUES = 400_000  # value differences; SDXL has 83,200
MAX_LAYERS = 1_000
MAX_WORDS = 75  # word vectors: the tokens of a prompt
MAX_WIDTH = 4_096  # of a word vector, i_star and dual; SDXL has 1,280 and 2,048
MAX_ABS = 1e4
SPEC = {
    "tiny": "minikin-tiny/minikin",
    "sd1": "stable-diffusion-v1/minikin",
    "sd2": "stable-diffusion-v2-768-v/minikin",
    "sdxl": "stable-diffusion-xl-v1-base/minikin",
    "pixart-alpha": "pixart-alpha/minikin",
    "pixart-sigma": "pixart-sigma/minikin",
    "sana": "sana/minikin",
}

_PATH = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn2"
)
_SHORT = re.compile(r"(?:([du])(\d+)|m)\.(\d+)")
_IN_TRANSFORMER, _TRANSFORMER = re.compile(r"transformer_blocks\.(\d+)\.attn2"), "t"


def save(
    concept: Concept, path: str | Path, *, int8: bool | None = None, metadata: dict[str, str] | None = None
) -> Path:
    """Write a concept file atomically and return its path.

    int8      store value differences in 8 bits; the default for SDXL only
    metadata  additional safetensors metadata
    Raises BadConceptFile for NaN or Inf, StorageError when the file cannot be written. An existing file
    of that name survives both.
    """
    data = to_bytes(concept, int8=int8, metadata=metadata)
    return atomic_write(path, data)


def store_points(path: Path, measured: operating_points.Points) -> bool:
    """Replace the operating points in a concept file; tensors and other metadata stay as they are.

    The preview is dropped if the file would exceed MAX_BYTES with it. Returns False, and writes nothing, if
    the points do not fit without it either. Raises BadConceptFile, StorageError.
    """
    load(path)
    tensors, meta = io.parse(path.read_bytes(), path.name)
    meta["minikin.points"] = _json(operating_points.as_json(measured))
    data = io.serialize(tensors, meta)
    if len(data) > MAX_BYTES and meta.pop("modelspec.thumbnail", ""):
        data = io.serialize(tensors, meta)
    if len(data) > MAX_BYTES:
        return False
    atomic_write(path, data)
    return True


def load(path: str | Path) -> Concept:
    """Read and validate a concept file; raises BadConceptFile."""
    path = Path(path)
    try:
        data = read_small(path, io.MAX_FILE)
        if data is None:
            raise BadConceptFile(
                f"{path.name} is no file, or one of more than {io.MAX_FILE} bytes; a concept is under 100 KB.",
                "concept_too_large",
            )
    except OSError as e:
        raise BadConceptFile(f"The concept file {path} cannot be read: {e.strerror}.") from e
    return from_bytes(data, path.name)


def to_bytes(concept: Concept, *, int8: bool | None = None, metadata: dict[str, str] | None = None) -> bytes:
    """A concept file as bytes; equal concepts give equal bytes. Raises BadConceptFile for NaN or Inf."""
    if not concept.is_finite():
        raise BadConceptFile(f"Concept '{concept.name}' holds NaN or Inf; it was not written.")
    flat = torch.cat([d.float().flatten() for d in concept.delta.values()])
    tensors: dict[str, Tensor] = {}
    if int8 if int8 is not None else concept.origin.architecture == "sdxl" or len(flat) > MAX_HALF:
        tensors["delta"], tensors["scale"] = _quantize(concept.delta)
    else:
        tensors["delta"] = flat.half()
    if concept.keys:
        tensors["keys"] = torch.cat([concept.keys[path].float().flatten() for path in concept.delta]).half()
    if concept.mode == "gated":
        tensors["i_star"] = concept.i_star.half()
        tensors["dual"] = (concept.dual / concept.dual.abs().max().clamp(min=1e-30)).half()
        for k, w in enumerate(concept.word_deltas):
            if "scale" in tensors:
                scale = w.float().abs().amax(1).clamp(min=1e-12) / 127
                tensors[f"word.{k}"] = (w.float() / scale[:, None]).round().to(torch.int8)
                tensors[f"wordscale.{k}"] = scale
            else:
                tensors[f"word.{k}"] = w.half()
    for name, t in tensors.items():
        if t.dtype is torch.float16 and not bool(torch.isfinite(t).all()):
            raise BadConceptFile(f"'{name}' of concept '{concept.name}' is too large for half precision.")
    facts = _metadata(concept) | (metadata or {})
    body = io.serialize(tensors, {})
    digest = hashlib.sha256(body[8 + int.from_bytes(body[:8], "little") :]).hexdigest()
    facts["modelspec.hash_sha256"] = "0x" + digest
    data = io.serialize(tensors, facts)
    if concept.preview:
        thumbnail = "data:image/jpeg;base64," + base64.b64encode(concept.preview).decode()
        with_preview = io.serialize(tensors, facts | {"modelspec.thumbnail": thumbnail})
        data = with_preview if len(with_preview) <= MAX_BYTES else data
    return data


def content(concept: Concept) -> str:
    """SHA-256 of a concept without its preview and operating points, as images record it."""
    return hashlib.sha256(to_bytes(replace(concept, preview=b"", points={}))).hexdigest()


def from_bytes(data: bytes, what: str = "the concept") -> Concept:
    """Parse and validate a concept file; `what` names it in errors. Raises BadConceptFile."""
    tensors, meta = io.parse(data, what)
    try:
        version = int(meta["minikin.format"])
    except (KeyError, ValueError):
        raise BadConceptFile(
            f"{what} is a safetensors file, but not a Minikin concept (no minikin.format in its metadata). "
            "To use a textual-inversion embedding, import it: minikin concepts import FILE.",
            "unsupported_concept_format",
        ) from None
    if version < 1:
        raise BadConceptFile(
            f"{what} has format {version}, which does not exist. Get the file again.", "concept_malformed"
        )
    if version > FORMAT:
        raise BadConceptFile(
            f"{what} has format {version}; this Minikin reads up to {FORMAT}. Update Minikin to use it.",
            "concept_too_new",
        )
    try:
        return _build(tensors, meta)
    except MinikinError as e:
        code = e.code if isinstance(e, BadConceptFile) else "concept_malformed"
        raise BadConceptFile(f"{what} is not a sound concept file: {e}", code) from None
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise BadConceptFile(
            f"{what} is not a sound concept file: {type(e).__name__} at {e}. Get the file again.",
            "concept_malformed",
        ) from None


def _build(tensors: dict[str, Tensor], meta: dict[str, str]) -> Concept:
    m = {k.removeprefix("minikin."): v for k, v in meta.items() if k.startswith("minikin.")}
    modes: dict[str, EditMode] = {v: k for k, v in FILE_MODES.items()}
    if m["mode"] not in modes:
        raise ValueError(f"mode {m['mode'][:20]!r}")
    mode = modes[m["mode"]]
    gated = mode == "gated"
    _check_sizes(tensors)
    words = tuple(_word(tensors, k) for k in range(2) if f"word.{k}" in tensors)
    allowed = {"delta", "scale", "keys"}
    if gated:
        allowed |= {"i_star", "dual", *(f"{n}.{k}" for k in range(len(words)) for n in ("word", "wordscale"))}
    unexpected = set(tensors) - allowed
    if unexpected or (gated and not words):
        raise BadConceptFile(
            f"unexpected tensors {sorted(unexpected)[:5]}. Get the file again.", "concept_unexpected_tensor"
        )
    delta = _deltas(tensors, _json_of(m["index"]))
    keys = _keys(tensors["keys"], delta) if "keys" in tensors else {}
    measured = operating_points.from_json(_json_of(m.get("points", "{}")))
    recipe = _printable(_json_of(m.get("recipe", "{}")))
    if not isinstance(recipe, dict):
        raise TypeError("a recipe that is not an object")
    i_star, dual = (tensors[k].float() if gated else torch.zeros(1) for k in ("i_star", "dual"))
    if i_star.ndim != 1 or i_star.shape != dual.shape or (gated and float(i_star @ dual) <= 0):
        raise ValueError("i_star and dual that do not fit")
    if len(words) > 2 or any(w.ndim != 2 or w.shape[0] != words[0].shape[0] for w in words):
        raise ValueError("word vectors that do not fit")
    preview = meta.get("modelspec.thumbnail", "").removeprefix("data:image/jpeg;base64,")
    concept = Concept(
        name=m["name"],
        category=m["category"],
        mode=mode,
        origin=Origin(
            architecture=_printable(m["architecture"]),
            fingerprint=_printable(m["fingerprint"]),
            text_hash=_printable(m["text_hash"]),
            licence=_printable(m.get("licence", "")),
            text_sketch=_printable(m.get("text_sketch", "")),
        ),
        word_deltas=words,
        i_star=i_star,
        dual=dual,
        delta=delta,
        keys=keys,
        c_hash=m.get("c_hash", ""),
        gate=_gate(_json_of(m["gate"])),
        points=measured,
        recipe=recipe,
        preview=base64.b64decode(preview) if preview else b"",
    )
    numbers = (*concept.delta.values(), *concept.keys.values(), i_star, dual, *words)
    largest = max(float(t.abs().max()) for t in numbers)
    if largest > MAX_ABS:
        raise BadConceptFile(
            f"a value of {largest:.3g} (at most {MAX_ABS:g} is plausible). Teach it again.",
            "concept_out_of_range",
        )
    return concept


def _gate(values: Any) -> Gate:
    """The gate of a file. Raises BadConceptFile for values that no training gives."""
    beta, tau = float(values["beta"]), float(values["tau"])
    (low, high), (hard, soft) = operating_points.BETAS, operating_points.TAUS
    if not (low <= beta <= high and hard <= tau <= soft):
        raise BadConceptFile(
            f"its gate has beta {beta:g} and tau {tau:g}; {low:g} to {high:g} and {hard:g} to {soft:g} are "
            "plausible. Teach it again.",
            "concept_out_of_range",
        )
    return Gate(beta, tau)


def _json_of(text: str) -> Any:
    """Parse JSON in a metadata value. Raises BadConceptFile."""
    try:
        return strict_json.loads(text, max_depth=io.MAX_DEPTH)
    except strict_json.BadJson as e:
        code = "concept_too_large" if "more than" in str(e) else "concept_malformed"
        raise BadConceptFile(f"metadata that is refused: {e}. Get the file again.", code) from None


def _printable(value: Any) -> Any:
    """Untrusted text, or JSON with it, without control and direction characters, which terminals would obey."""
    if isinstance(value, str):
        return without_controls(value)
    if isinstance(value, dict):
        return {_printable(k): _printable(v) for k, v in value.items()}
    return [_printable(v) for v in value] if isinstance(value, list) else value


def _check_sizes(tensors: dict[str, Tensor]) -> None:
    """Raise BadConceptFile for tensors larger than those of any base."""
    most: dict[str, tuple[int, ...]] = {
        "delta": (MAX_VALUES,), "keys": (MAX_VALUES,), "scale": (MAX_LAYERS,), "i_star": (MAX_WIDTH,),
        "dual": (MAX_WIDTH,), "word.0": (MAX_WORDS, MAX_WIDTH), "word.1": (MAX_WORDS, MAX_WIDTH),
        "wordscale.0": (MAX_WORDS,), "wordscale.1": (MAX_WORDS,),
    }  # fmt: skip
    for name, sizes in most.items():
        shape = tuple(tensors[name].shape) if name in tensors else ()
        if len(shape) > len(sizes) or any(n > size for n, size in zip(shape, sizes, strict=False)):
            raise BadConceptFile(
                f"'{name}' has the shape {shape}, more than {sizes}. Get the file again.", "concept_too_large"
            )


def _word(tensors: dict[str, Tensor], k: int) -> Tensor:
    word = tensors[f"word.{k}"]
    if word.dtype is not torch.int8:
        return word.float()
    scale = tensors[f"wordscale.{k}"]
    if word.ndim != 2 or scale.shape != word.shape[:1]:
        raise ValueError(f"wordscale.{k} does not fit the word's {len(word)} vectors")
    return word.float() * scale[:, None]


def _metadata(c: Concept) -> dict[str, str]:
    facts = {
        "format": str(FORMAT),
        "name": c.name,
        "category": c.category,
        "mode": FILE_MODES[c.mode],
        "architecture": c.origin.architecture,
        "fingerprint": c.origin.fingerprint,
        "text_hash": c.origin.text_hash,
        "text_sketch": c.origin.text_sketch,
        "licence": c.origin.licence,
        "c_hash": c.c_hash,
        "gate": _json({"beta": c.gate.beta, "tau": c.gate.tau}),
        "points": _json(operating_points.as_json(c.points)),
        "recipe": _json(c.recipe),
        "index": _json(_index(c.delta)),
    }
    return {f"minikin.{k}": v for k, v in facts.items()} | {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": SPEC.get(c.origin.architecture, "unknown/minikin"),
        "modelspec.implementation": "minikin",
        "modelspec.title": c.name,
        "modelspec.trigger_phrase": f"<{c.name}>",
        "modelspec.license": c.origin.licence,
    }


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def _quantize(delta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    scales = torch.tensor([float(d.abs().max().clamp(min=1e-12)) / 127 for d in delta.values()])
    flat = [
        (d.float() / s).round().clamp(-127, 127).to(torch.int8)
        for d, s in zip(delta.values(), scales, strict=True)
    ]
    return torch.cat(flat), scales


def _index(delta: dict[str, Tensor]) -> list[list[Any]]:
    """[transformer, width, number of layers] per transformer, in order; SDXL's 70 layers become 11 entries."""
    entries: list[list[Any]] = []
    for path, d in delta.items():
        name, at = _short(path)
        if entries and entries[-1][:2] == [name, d.numel()] and at == entries[-1][2]:
            entries[-1][2] += 1
        elif at == 0:
            entries.append([name, d.numel(), 1])
        else:
            raise BadConceptFile(
                f"The layer {path} is out of order; layers must follow each other as in the denoiser."
            )
    return entries


def _deltas(tensors: dict[str, Tensor], index: list[list[Any]]) -> dict[str, Tensor]:
    counts = [int(n) for _, _, n in index]
    if min(counts) < 1 or sum(counts) > MAX_LAYERS:
        raise ValueError(f"not 1 to {MAX_LAYERS} layers")
    layers = [(_long(str(name), k), int(w)) for name, w, n in index for k in range(int(n))]
    paths, widths = [path for path, _ in layers], [width for _, width in layers]
    flat = tensors["delta"]
    if flat.ndim != 1 or sum(widths) != flat.numel() or min(widths) < 1 or flat.numel() > MAX_VALUES:
        raise ValueError(f"the index lists {sum(widths)} value differences, the file has {flat.numel()}")
    parts = list(torch.split(flat.float(), widths))
    if flat.dtype is torch.int8:
        scale = tensors["scale"]
        if scale.shape != (len(parts),):
            raise ValueError("scale does not fit the layers")
        parts = [p * s for p, s in zip(parts, scale, strict=True)]
    if len(set(paths)) != len(paths):
        raise ValueError("a layer occurs twice")
    return dict(zip(paths, parts, strict=True))


def _keys(flat: Tensor, delta: dict[str, Tensor]) -> dict[str, Tensor]:
    widths = [d.numel() for d in delta.values()]
    if flat.ndim != 1 or flat.numel() != sum(widths):
        raise ValueError(f"{flat.numel()} key differences for {sum(widths)} value differences")
    return dict(zip(delta, torch.split(flat.float(), widths), strict=True))


def _short(path: str) -> tuple[str, int]:
    """Abbreviated name of a layer's transformer, and the layer's index in it."""
    if block := _IN_TRANSFORMER.fullmatch(path):
        return _TRANSFORMER, int(block[1])
    m = _PATH.fullmatch(path)
    if not m:
        raise BadConceptFile(f"The layer {path} is of no known family; its concept cannot be written.")
    where = f"{m[1][0]}{m[2]}" if m[1] else "m"
    return f"{where}.{m[3]}", int(m[4])


def _long(short: str, at: int) -> str:
    if short == _TRANSFORMER:
        return f"transformer_blocks.{at}.attn2"
    m = _SHORT.fullmatch(short)
    if not m:
        raise ValueError(f"a layer named {short[:40]!r}")
    where = f"{'down' if m[1] == 'd' else 'up'}_blocks.{m[2]}" if m[1] else "mid_block"
    return f"{where}.attentions.{m[3]}.transformer_blocks.{at}.attn2"
