"""Export to rank-1 LoRA (PEFT, kohya) and textual inversion, and import of textual inversion.

Without its gate the edit is linear in the encoding, and equals a rank-1 LoRA on every to_k and to_v:
Delta W = (o* - W i*) a^T with a = M i* / (i*^T M i*). The word vectors become a textual inversion
embedding. The gate is lost, so the LoRA changes related words too.

A concept of mode "value" edits one token. Its LoRA uses i* = e_category: keys do not change, and values
change by delta s(e) wherever the encoding has a component along the category's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikin.errors import BadConceptFile, BadModelFile, BadRecipe, UnknownName
from minikin.files import atomic_write, read_small
from minikin.models.base import Base
from minikin.models.loading.single_file import read_header
from minikin.models.lora import lora_file, lora_keys
from minikin.models.unet_names import original_name
from minikin.perfusion import edit
from minikin.perfusion.concept import Concept, check_category, check_name
from minikin.perfusion.conditioning import unpacked_delta
from minikin.perfusion.covariance import covariance
from minikin.perfusion.key_lock import category_encoding

MAX_EMBEDDING = 4 * 2**20  # SDXL, 75 vectors, float32: 0.6 MB
KINDS = ("peft", "kohya", "textual-inversion")
ALIASES = {
    "comfyui": "kohya",
    "a1111": "kohya",
    "forge": "kohya",
    "webui": "kohya",
    "diffusers": "peft",
    "embedding": "textual-inversion",
}
READ_BY = {  # who reads a format
    "peft": "For diffusers: pipe.load_lora_weights. For ComfyUI and A1111, export with --to kohya.",
    "kohya": "For ComfyUI, A1111, Forge and others: put it into their folder of LoRAs. diffusers reads it too.",
    "textual-inversion": "For all of them: put it into the folder of embeddings.",
}
_LOST_VALUE = (
    "Lost without its token position: the LoRA acts on the word '{category}' wherever it stands, and on "
    "related words. It has no word of its own: name the category in prompts."
)
_LOST = (
    "Lost without the gate: the LoRA acts on related words and on padding too, strength scales the whole "
    "change, and prompts that do not name the concept are changed as well. Use it together with the "
    "embedding (--to textual-inversion)."
)


def format_of(to: str) -> str:
    """The format of KINDS that a name stands for, a tool's too (see ALIASES); raises UnknownName."""
    name = ALIASES.get(to.lower(), to.lower())
    if name not in KINDS:
        raise UnknownName("format", to, (*KINDS, *ALIASES))
    return name


def check_exportable(concept: Concept) -> str:
    """The published base that a concept's export is for; raises BadRecipe where no other tool reads it."""
    usual = {"tiny": "tiny", "sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
    if concept.origin.architecture not in usual:
        raise BadRecipe(
            f"Concept '{concept.name}' was taught on {concept.origin.architecture}; concepts of "
            f"{', '.join(usual)} can be exported. Use it here, or with attach() on a diffusers pipeline."
        )
    return usual[concept.origin.architecture]


def export(base: Base, concept: Concept, to: str, file: Path) -> str:
    """Write a concept in another tool's format; returns sentences that say who reads it and what it loses.

    to  one of KINDS, or of ALIASES
    Raises UnknownName for another format, BadRecipe for a concept that the format cannot hold.
    """
    from safetensors.torch import save

    to = format_of(to)
    base.require_unet("Export to other tools")
    if to == "textual-inversion" and concept.mode == "value":
        raise BadRecipe(
            f"Concept '{concept.name}' was taught in mode 'value', which has no word of its own to write as an "
            "embedding. Export it as a LoRA (--to kohya, --to peft), or teach it with --mode gated."
        )
    if to == "textual-inversion":
        atomic_write(file, save(_embedding(base, concept)))
        return f"{READ_BY[to]} Lost without the LoRA: an embedding alone carries only the word, not the values."
    parts = lora_factors(base, concept)
    if to == "peft":
        tensors = {
            f"unet.{path}.{name}.lora_{ab}.weight": t
            for (path, name), pair in parts.items()
            for ab, t in zip("AB", pair, strict=True)
        }
        facts = {"r": 1, "lora_alpha": 1, "target_modules": sorted({f"{path}.{n}" for path, n in parts})}
        meta = {"format": "pt", "lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in facts.items()})}
    else:
        tensors = {}
        for (path, name), (a, b) in parts.items():
            key = f"lora_unet_{_kohya_name(path, base.is_xl)}_{name}"
            tensors |= {
                f"{key}.lora_down.weight": a,
                f"{key}.lora_up.weight": b,
                f"{key}.alpha": torch.tensor(1.0),
            }
        meta = _kohya_metadata(base, concept)
    atomic_write(file, save({k: t.contiguous() for k, t in tensors.items()}, meta))
    lost = _LOST if concept.mode == "gated" else _LOST_VALUE.format(category=concept.category)
    return f"{READ_BY[to]} {lost}"


@torch.no_grad()
def lora_factors(base: Base, concept: Concept) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """LoRA factors (layer path, "to_k" or "to_v") -> A (1, D), B (width, 1), float32; exact for the open gate.

    In mode "value" only projections that change: to_v, and to_k if keys were trained.
    """
    category = category_encoding(base, concept.category).cpu()
    if concept.mode == "gated":
        i_star, dual = concept.i_star.float(), concept.dual.float()
    else:
        i_star, dual = category, edit.dual(category, covariance(base).inverse)
    a = (dual / (i_star @ dual))[None]
    out = {}
    for layer in base.layout.layers:
        attn: Any = base.denoiser.get_submodule(layer.path)
        for name in ("to_k", "to_v"):
            projection = getattr(attn, name)
            weight = getattr(projection, "base_layer", projection).weight.float().cpu()
            b = weight @ (category - i_star)  # o* - W i*, o* = W e_category (+ delta)
            learned = concept.delta if name == "to_v" else concept.keys
            if concept.mode == "value" and not learned:
                continue
            if learned:
                b = b + learned[layer.path].float()
            out[layer.path, name] = (a.clone(), b[:, None])
    return out


def _embedding(base: Base, concept: Concept) -> dict[str, Tensor]:
    of_category = base.word_vectors(concept.category)
    words = [(w.cpu() + d).contiguous() for w, d in zip(of_category, concept.word_deltas, strict=True)]
    if base.is_xl:
        return dict(zip(("clip_l", "clip_g"), words, strict=True))
    return {f"<{concept.name}>": words[0]}


def _kohya_name(path: str, xl: bool) -> str:
    """kohya's name of a layer; SDXL uses the original (sgm) block numbers."""
    return (original_name(path) if xl else path).replace(".", "_")


def _kohya_metadata(base: Base, concept: Concept) -> dict[str, str]:
    version = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}.get(base.architecture, "tiny")
    return {
        "ss_v2": str(base.architecture == "sd2"),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "1",
        "ss_network_alpha": "1",
        "ss_network_args": "{}",
        "ss_output_name": concept.name,
        "ss_training_comment": "rank-1 edit of Minikin, "
        + ("gate fixed open" if concept.mode == "gated" else "at the category's direction"),
    }


# ---- import ---------------------------------------------------------------------------------------


def read_embedding(path: Path, n_encoders: int, name: str = "") -> list[Tensor]:
    """Read the word vectors of a textual-inversion file, per text encoder (n, d_k), float32.

    Layouts: diffusers {token: T}, kohya {emb_params: T}, SDXL {clip_l, clip_g}, OneTrainer {emp_params}, and
    those that OneTrainer bundles in a LoRA's file; vectors (n, d) or (d,).
    name  which one, where a LoRA bundles several
    Raises BadConceptFile, also for pickles (A1111's .pt).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        most = lora_file.MAX_BYTES if (bundled := _is_bundle(path)) else MAX_EMBEDDING
        data = read_small(path, most)
        if data is None:
            raise BadConceptFile(
                f"{path.name} is no file, or has more than {most} bytes, which no embedding needs.",
                "concept_too_large",
            )
        tensors = _of_bundle(path, load(data), name) if bundled else load(data)
    except OSError as e:
        raise BadConceptFile(f"The embedding {path} cannot be read: {e.strerror}.") from e
    except SafetensorError as e:
        raise BadConceptFile(
            f"{path.name} is not a safetensors file. Embeddings in .pt or .bin are pickles, which can run "
            "code, and are never opened. Turn it into .safetensors without running it: "
            f"minikin models convert {path}",
            "unsupported_concept_format",
        ) from e
    tensors = {k: v for k, v in tensors.items() if not k.endswith("_out")}
    if "delta" in tensors:
        raise BadConceptFile(
            f"{path.name} is a concept already; there is nothing to import. Use it from this folder, or put it "
            "into your library: minikin concepts add FILE."
        )
    if {"clip_l", "clip_g"} <= set(tensors):
        vectors = [tensors["clip_l"], tensors["clip_g"]]
    elif len(tensors) == 1:
        vectors = list(tensors.values())
    else:
        raise BadConceptFile(
            f"{path.name} is not a textual-inversion embedding; it holds {', '.join(list(tensors)[:5])}. "
            "Expected one tensor, or clip_l and clip_g."
        )
    if len(vectors) != n_encoders:
        raise BadConceptFile(
            f"{path.name} has vectors for {len(vectors)} text encoder(s); this base has {n_encoders}."
        )
    if any(t.ndim not in (1, 2) or not t.numel() or not bool(torch.isfinite(t.float()).all()) for t in vectors):
        raise BadConceptFile(
            f"{path.name} holds vectors that are empty, of another shape, or not finite.", "concept_non_finite"
        )
    return [t.float().reshape(-1, t.shape[-1]) for t in vectors]


def _is_bundle(path: Path) -> bool:
    """True for a LoRA with embeddings in its file."""
    try:
        return any(k.startswith(lora_keys.EMBEDDING) for k in read_header(path)[0])
    except BadModelFile:
        return False


def _of_bundle(path: Path, tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one embedding in a LoRA's file."""
    names = lora_keys.embedding_names(tensors)
    chosen = [n for n in names if len(names) == 1 or _word(n) == _word(name)]
    if len(chosen) != 1:
        words = " and ".join(names)
        raise BadConceptFile(
            f"{path.name} holds {len(names)} embeddings, {words}. Give the one you want as --name."
        )
    parts = {lora_keys.bundled(key): t for key, t in tensors.items()}
    return {part: t for (of, part), t in parts.items() if of == chosen[0]}


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _with_tokens(base: Base, category: str, n: int, file: str) -> str:
    """The category, repeated until it has at least n tokens, one for each vector; raises BadConceptFile."""
    most, tokens = base.n_tokens - 2, base.count_tokens(category)
    repeats = max(1, -(-n // tokens))
    if n > most:
        raise BadConceptFile(
            f"{file} has {n} vectors, and this base reads at most {most} tokens at a time: it was made for "
            "another one."
        )
    if repeats * tokens > most:
        raise BadConceptFile(
            f"{file} has {n} vectors, and the category '{category}' takes {tokens} tokens, which do not divide "
            f"into the {most} that this base reads at a time. Give a category of one token, such as cat."
        )
    return check_category(" ".join([category] * repeats))


@torch.no_grad()
def import_embedding(base: Base, path: Path, name: str, category: str) -> Concept:
    """A concept from a textual-inversion embedding: its word vectors, with keys locked to the category.

    The values are those of the embedding: delta = W_value (i* - e_category). Raises BadConceptFile, BadRecipe.
    """
    check_name(name)
    check_category(category)
    base.require_unet("Import of embeddings")
    vectors = read_embedding(path, len(base.text_encoders), name)
    of_category = base.word_vectors(category)
    for vector, word in zip(vectors, of_category, strict=True):
        if vector.shape[1] != word.shape[1]:
            raise BadConceptFile(
                f"{path.name} has vectors of {vector.shape[1]} numbers; this base's words have "
                f"{word.shape[1]}. It was made for another family."
            )
    category = _with_tokens(base, category, len(vectors[0]), path.name)
    of_category = base.word_vectors(category)
    words = tuple(torch.cat([v.to(w), w[len(v) :]]) for v, w in zip(vectors, of_category, strict=True))
    i_star = category_encoding(base, category, words)
    difference = i_star - category_encoding(base, category)
    values = [
        base.denoiser.get_submodule(layer.path).to_v(difference.to(base.dtype)).float()
        for layer in base.layout.layers
    ]
    second_moment = covariance(base)
    return Concept(
        name=name,
        category=category,
        mode="gated",
        origin=base.origin,
        word_deltas=tuple((w - c).cpu() for w, c in zip(words, of_category, strict=True)),
        i_star=i_star.cpu(),
        dual=edit.dual(i_star.cpu(), second_moment.inverse),
        delta=unpacked_delta(base, torch.cat(values)),
        c_hash=second_moment.hash,
        recipe={"imported": "textual-inversion"},
    )
