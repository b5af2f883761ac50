"""Published weights, read by transformers and diffusers: from this machine, whole, or an error says why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minikin.errors import BadModelFile, MinikinError


@contextmanager
def readable(what: str, hint: str = "") -> Iterator[None]:
    """Whatever a library raises inside becomes BadModelFile: `what` cannot be read, and the hint."""
    try:
        yield
    except MinikinError:
        raise
    except Exception as e:  # transformers has no one error of its own
        raise BadModelFile(f"{what} cannot be read ({e}).{hint}") from e


def network(kind: Any, where: str, what: str, *, hint: str = "", again: str = "", **options: Any) -> Any:
    """A network in float32, for use only. Nothing is downloaded, and no pickle is opened.

    kind   the class whose `from_pretrained` reads it, told the options
    where  a folder, or a hub id in the local cache
    what   its weights, in the plural and with their place, as errors name them
    hint   what to do where they cannot be read; again, where they are not whole
    Raises BadModelFile.
    """
    with readable(what, hint):
        model, told = kind.from_pretrained(
            where, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
            **options,
        )  # fmt: skip
    wrong = sorted(str(k) for k in (*told["missing_keys"], *told.get("mismatched_keys", ())))
    if wrong:  # transformers would go on with random numbers in their place
        raise BadModelFile(
            f"{what} are not whole: {len(wrong)} tensors are missing or of another shape, first "
            f"{', '.join(wrong[:5])}.{again}"
        )
    return model.eval().requires_grad_(False)
