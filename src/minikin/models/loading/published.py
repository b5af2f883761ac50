"""Loading published networks from local files through transformers and diffusers, with errors that say why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minikin.errors import BadModelFile, MinikinError
from minikin.models.loading.lock import opening


@contextmanager
def readable(what: str, hint: str = "") -> Iterator[None]:
    """Context that turns exceptions of a library into BadModelFile: "`what` cannot be read", and the hint."""
    try:
        yield
    except MinikinError:
        raise
    except Exception as e:  # transformers has no common error class
        raise BadModelFile(f"{what} cannot be read ({e}).{hint}") from e


@opening()
def network(kind: Any, where: str, what: str, *, hint: str = "", again: str = "", **options: Any) -> Any:
    """Load a network in float32 for inference. Nothing is downloaded, and no pickle is opened.

    kind     class with `from_pretrained`, which receives the options
    where    a folder, or a hub id in the local cache
    what     name of the weights in errors, in the plural
    hint     advice if they cannot be read
    again    advice if tensors are missing
    Raises BadModelFile.
    """
    with readable(what, hint):
        model, report = kind.from_pretrained(
            where,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    wrong = sorted(str(k) for k in (*report["missing_keys"], *report.get("mismatched_keys", ())))
    if wrong:  # transformers would use random values for them
        raise BadModelFile(
            f"{what} are incomplete: {len(wrong)} tensors are missing or of another shape, first "
            f"{', '.join(wrong[:5])}.{again}"
        )
    return model.eval().requires_grad_(False)
