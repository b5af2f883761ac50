"""A word's vector, trained and stored: what Textual Inversion is, and a part of Custom Diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minikin.errors import BadConceptFile
from minikin.files import atomic_write
from minikin.models.base import Base
from minikin.perfusion.export import read_embedding


def start(base: Base, text: str) -> tuple[Tensor, ...]:
    """Per text encoder (1, d_k): the vector of a text's last token, where the new word begins."""
    return tuple(v[-1:] for v in base.word_vectors(text))


def write(base: Base, words: tuple[Tensor, ...], token: str, path: Path) -> Path:
    """As diffusers' load_textual_inversion reads it: {token: (1, d)}, or clip_l and clip_g for SDXL."""
    from safetensors.torch import save

    keys = ("clip_l", "clip_g") if base.is_xl else (token,)
    return atomic_write(path, save(dict(zip(keys, words, strict=True))))


def read(base: Base, path: Path) -> tuple[Tensor, ...]:
    """The inverse. Raises BadConceptFile, also when the vectors are of another width."""
    found = read_embedding(path, len(base.text_encoders))
    wanted = [(1, m.get_input_embeddings().embedding_dim) for m in base.text_encoders]
    if [tuple(v.shape) for v in found] != wanted:
        raise BadConceptFile(
            f"{path.name} holds vectors of {[tuple(v.shape) for v in found]}; this base has words of {wanted}."
        )
    return tuple(found)


def tensors(path: Path) -> Mapping[str, Tensor]:
    """All tensors of a safetensors file, float32. Raises BadConceptFile."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {k: v.float() for k, v in load_file(path).items()}
    except (OSError, SafetensorError) as e:
        raise BadConceptFile(f"{path} cannot be read as a safetensors file ({e}). Teach it again.") from e
