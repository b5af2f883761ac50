"""A judge as one safetensors file that describes itself: weights in eight bits, JSON in the header.

The header's "minikin" entry holds the kind of judge, its shapes and its names, so that a file alone is
enough to build the network again. A matrix is kept as int8 with one scale for each row, half the size of
half precision at the same accuracy (docs/tiny.md); vectors stay in half precision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minikin.errors import AssetError
from minikin.files import atomic_write

FORMAT = 2
SCALE = ".scale"  # after the name of a matrix in eight bits
REMEDY = "Reinstall minikin, or train it again with `python -m tools.tiny_training`."


def embedded(kind: str) -> Path:
    """Where the package keeps this judge."""
    return Path(str(resources.files("minikin.tiny") / "encoders" / "weights" / f"{kind}.safetensors"))


def as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as a file gives them back (tuples are lists), so that both compare equal."""
    return dict(json.loads(json.dumps(facts)))


def write(path: Path, kind: str, net: nn.Module, facts: Mapping[str, Any]) -> None:
    """Raises StorageError with the reason; an older file then survives."""
    from safetensors.torch import save

    tensors = {name: t for k, v in net.state_dict().items() for name, t in _packed(k, v.detach().cpu()).items()}
    meta = {"format": FORMAT, "kind": kind, **facts}
    atomic_write(path, save(tensors, {"minikin": json.dumps(meta)}))


def read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in float32 and the facts. Raises AssetError when the file is not what it should be."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise AssetError(f"The weights of the {kind} are missing: {path} does not exist. {REMEDY}")
    try:
        with safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {})["minikin"])
            packed = {k: f.get_tensor(k).float() for k in f.keys()}  # noqa: SIM118 - not a dict
        found = (meta["kind"], meta["format"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
        raise AssetError(
            f"The weights of the {kind}, {path}, cannot be read ({type(e).__name__}: {e}). "
            f'Expected a safetensors file with a "minikin" entry in its header. {REMEDY}'
        ) from e
    if found != (kind, FORMAT):
        raise AssetError(
            f"{path} holds a {found[0]} of format {found[1]}; expected a {kind} of format {FORMAT}. {REMEDY}"
        )
    scales = {k: packed.pop(k) for k in list(packed) if k.endswith(SCALE)}
    return {k: v * scales[k + SCALE] if k + SCALE in scales else v for k, v in packed.items()}, meta


def _packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """What the file keeps of one weight: rows are scaled so that their largest number is 127."""
    if weight.ndim < 2:
        return {name: weight.half().contiguous()}
    rows = weight.float().flatten(1).abs().amax(1).clamp(min=1e-6) / 127
    scale = rows.half().view(-1, *[1] * (weight.ndim - 1))
    return {
        name: (weight / scale.float()).round().clamp(-127, 127).to(torch.int8).contiguous(),
        name + SCALE: scale,
    }


def fill(path: Path, net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors into the network. Raises AssetError when names, shapes or numbers are off."""
    want = net.state_dict()
    wrong = sorted({*want, *tensors} - {k for k in want if k in tensors and want[k].shape == tensors[k].shape})
    wrong += [k for k, v in tensors.items() if k not in wrong and not bool(torch.isfinite(v).all())]
    if wrong:
        raise AssetError(
            f"{path} does not fit its own description: {len(wrong)} tensors are missing, extra, of another "
            f"shape or not finite, first {', '.join(wrong[:5])}. {REMEDY}"
        )
    net.load_state_dict(dict(tensors))
