"""A training run as one safetensors file: model, EMA, optimizer and best weights; tensors and JSON only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minikin.errors import AssetError, BadRecipe
from minikin.files import atomic_write
from minikin.recipes import Baseline, Distill, Teach


def gather(
    model: nn.Module, ema: Sequence[Tensor], optimizer: torch.optim.Optimizer, best: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of a run by their names in the file. Those on the CPU share the run's memory."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{i}": v for i, v in enumerate(ema)}
    tensors |= {f"best.{k}": v for k, v in best.items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


def write(path: Path, tensors: dict[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Raises StorageError with the reason; an older file then survives."""
    from safetensors.torch import save

    atomic_write(path, save(tensors, {"minikin": json.dumps(meta)}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON. Raises AssetError when the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a dict
            header: dict[str, str] = f.metadata()
        if "progress" in header:
            return _of_teaching_0_1(tensors, header)
        meta = json.loads(header["minikin"])
        meta["facts"], meta["state"] = _current(meta["facts"]), _current_state(meta["state"])
        return tensors, meta
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
        raise AssetError(
            f"The checkpoint {path} cannot be read ({type(e).__name__}: {e}). Expected a file that this "
            "version wrote. Delete it to start the stage anew."
        ) from e


def compare_facts(
    path: Path | None, meta: Mapping[str, Any], facts: Mapping[str, Any], former_facts: Mapping[str, Any]
) -> list[str]:  # fmt: skip
    """The former facts (see `Trainer`) that differ. Raises BadRecipe for the checkpoint of another run."""
    recorded = meta["facts"]
    former = former_facts if recorded.keys() & former_facts and facts.keys() - recorded else {}
    comparable = {k: v for k, v in recorded.items() if k not in former}
    if former or meta.get("partial_facts"):  # earlier versions wrote fewer facts
        comparable = {**facts, **comparable}
    differ = [k for k in {**comparable, **facts} if comparable.get(k) != facts.get(k)]
    if differ:
        k = differ[0]
        raise BadRecipe(
            f"The checkpoint {path} belongs to another run: {k} is {comparable.get(k)} there and "
            f"{facts.get(k)} here. Use the same settings, another --out, or delete it to start anew."
        )
    return [k for k, value in former.items() if recorded.get(k) != value]


def restore(
    path: Path | None, tensors: Mapping[str, Tensor], model: nn.Module, ema: Sequence[Tensor],
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
            p = parameters[int(number)]
            is_moment = value.shape == p.shape and name != "step"
            moment = torch.empty_like(p).copy_(value) if is_moment else value.clone()
            state["state"].setdefault(int(number), {})[name] = moment.detach()
        optimizer.load_state_dict(state)
    except (RuntimeError, KeyError, IndexError, ValueError) as e:
        raise AssetError(
            f"The checkpoint {path} does not fit the model of this recipe ({e}). Use the settings it was made "
            "with, another --out, or delete it to start anew."
        ) from e


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def is_finite(model: nn.Module) -> bool:
    """Whether no weight is NaN or Inf."""
    return all(bool(torch.isfinite(v).all()) for v in model.state_dict().values())


# ---- checkpoints of version 0.1 ------------------------------------------------------------------


def _current(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings by the names that options have now."""
    for recipe in (Teach, Baseline, Distill):
        facts = recipe.current(facts)
    return dict(facts)


def _current_state(state: dict[str, Any]) -> dict[str, Any]:
    return {"lr_scale" if k == "rate" else k: v for k, v in state.items()}


def _of_teaching_0_1(
    tensors: dict[str, Tensor], header: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Concept training had a format of its own: `student.word.0`, and progress and facts as JSON each."""
    names = {k: k.replace("student.", "model.", 1).replace(".word.", ".words.") for k in tensors}
    facts = _current(json.loads(header["facts"]))
    state = _current_state(json.loads(header["progress"]))
    meta = {"state": {"batch": facts["batch"], **state}, "facts": facts, "averaged": 0, "partial_facts": True}
    return {names[k]: v for k, v in tensors.items()}, meta
