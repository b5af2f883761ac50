"""A training run as one safetensors file: weights, their average, the optimizer; tensors and JSON only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minikin.errors import AssetError
from minikin.files import atomic_write


def write(
    path: Path, model: nn.Module, ema: Sequence[Tensor], optimizer: torch.optim.Optimizer,
    meta: Mapping[str, Any],
) -> None:  # fmt: skip
    """Raises StorageError with the reason; an older file then survives."""
    from safetensors.torch import save

    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{i}": v for i, v in enumerate(ema)}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"minikin": json.dumps(meta)})
    atomic_write(path, data)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON. Raises AssetError when the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as f:
            meta = json.loads(f.metadata()["minikin"])
            return {k: f.get_tensor(k) for k in f.keys()}, meta  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
        raise AssetError(
            f"The checkpoint {path} cannot be read ({type(e).__name__}: {e}). Expected a file that this build "
            "wrote. Delete it to start the stage anew."
        ) from e


def restore(
    path: Path, tensors: Mapping[str, Tensor], model: nn.Module, ema: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:  # fmt: skip
    """Put everything back, in the memory layout of the model at hand. Raises AssetError on other shapes.

    Layout matters: the fused AdamW walks raw memory, so moments that lie otherwise than their
    parameter (channels last) would be applied to the wrong weights.
    """
    try:
        model.load_state_dict(under(tensors, "model."))
        for i, average in enumerate(ema):
            average.copy_(tensors[f"ema.{i}"])
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        state: dict[str, Any] = optimizer.state_dict()
        state["state"] = {}
        for key, value in under(tensors, "optimizer.").items():
            number, name = key.split(".", 1)
            i = int(number)
            p = parameters[i]
            moment = torch.empty_like(p).copy_(value) if value.shape == p.shape and name != "step" else value
            state["state"].setdefault(i, {})[name] = moment.detach()
        optimizer.load_state_dict(state)
    except (RuntimeError, KeyError, IndexError, ValueError) as e:
        raise AssetError(
            f"The checkpoint {path} does not fit the model of this recipe ({e}). Use the settings it was made "
            "with, another --out, or delete it to start anew."
        ) from e


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(v).all()) for v in model.state_dict().values())
