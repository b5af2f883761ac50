"""Files of a trained word vector: the whole of Textual Inversion, and a part of Custom Diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minikin.errors import BadConceptFile
from minikin.files import atomic_write
from minikin.models.base import Base
from minikin.perfusion.export import read_embedding


def start(base: Base, text: str) -> tuple[Tensor, ...]:
    """Per text encoder (1, d_k): the vector of a text's last token, the initial value of the new word."""
    return tuple(v[-1:] for v in base.word_vectors(text))


def write(base: Base, words: tuple[Tensor, ...], token: str, path: Path) -> Path:
    """For diffusers' load_textual_inversion: {token: (1, d)}, or clip_l and clip_g for SDXL."""
    from safetensors.torch import save

    keys = ("clip_l", "clip_g") if base.is_xl else (token,)
    return atomic_write(path, save(dict(zip(keys, words, strict=True))))


def read(base: Base, path: Path) -> tuple[Tensor, ...]:
    """The inverse of `write`. Raises BadConceptFile, also for vectors of another width."""
    vectors = read_embedding(path, len(base.text_encoders))
    shapes = [(1, m.get_input_embeddings().embedding_dim) for m in base.text_encoders]
    if [tuple(v.shape) for v in vectors] != shapes:
        raise BadConceptFile(
            f"{path.name} holds vectors of {[tuple(v.shape) for v in vectors]}; this base needs {shapes}."
        )
    return tuple(vectors)


def tensors(path: Path) -> Mapping[str, Tensor]:
    """All tensors of a safetensors file, float32. Raises BadConceptFile."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {k: v.float() for k, v in load_file(path).items()}
    except (OSError, SafetensorError) as e:
        raise BadConceptFile(f"{path} cannot be read as a safetensors file ({e}). Teach it again.") from e
