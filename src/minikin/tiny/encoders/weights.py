"""Weight files of the sticker world's encoders: safetensors with int8 matrices and the shapes in the header.

The header's "minikin" entry holds the kind of network, its shapes and its names, so the network can be
built from the file alone. A matrix is stored as int8 with one scale for each row, half the size of half
precision at the same accuracy (docs/tiny.md); vectors are stored in half precision.
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
    """Path of the weights in the package."""
    return Path(str(resources.files("minikin.tiny") / "encoders" / "weights" / f"{kind}.safetensors"))


def as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as they are read back from a file (tuples become lists), for comparison."""
    return dict(json.loads(json.dumps(facts)))


def write(path: Path, kind: str, net: nn.Module, facts: Mapping[str, Any]) -> None:
    """Write a weight file atomically. Raises StorageError; an older file then stays."""
    from safetensors.torch import save

    tensors = {name: t for k, v in net.state_dict().items() for name, t in _packed(k, v.detach().cpu()).items()}
    meta = {"format": FORMAT, "kind": kind, **facts}
    atomic_write(path, save(tensors, {"minikin": json.dumps(meta)}))


def read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in float32 and the facts of a file. Raises AssetError for a missing, damaged or other file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise AssetError(f"The encoder weights are missing: {path} does not exist. {REMEDY}")
    try:
        with safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {})["minikin"])
            packed = {k: f.get_tensor(k).float() for k in f.keys()}  # noqa: SIM118 - not a dict
        kind_and_format = (meta["kind"], meta["format"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
        raise AssetError(
            f"The encoder weights {path} cannot be read ({type(e).__name__}: {e}). "
            f'Expected a safetensors file with a "minikin" entry in its header. {REMEDY}'
        ) from e
    if kind_and_format != (kind, FORMAT):
        raise AssetError(
            f"{path} holds a {kind_and_format[0]} of format {kind_and_format[1]}; "
            f"expected a {kind} of format {FORMAT}. {REMEDY}"
        )
    scales = {k: packed.pop(k) for k in list(packed) if k.endswith(SCALE)}
    return {k: v * scales[k + SCALE] if k + SCALE in scales else v for k, v in packed.items()}, meta


def _packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The tensors stored for one weight; rows are scaled so that their largest absolute value is 127."""
    if weight.ndim < 2:
        return {name: weight.half().contiguous()}
    rows = weight.float().flatten(1).abs().amax(1).clamp(min=1e-6) / 127
    scale = rows.half().view(-1, *[1] * (weight.ndim - 1))
    return {
        name: (weight / scale.float()).round().clamp(-127, 127).to(torch.int8).contiguous(),
        name + SCALE: scale,
    }


def fill(path: Path, net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors into the network. Raises AssetError for other names or shapes, NaN or Inf."""
    want = net.state_dict()
    wrong = sorted({*want, *tensors} - {k for k in want if k in tensors and want[k].shape == tensors[k].shape})
    wrong += [k for k, v in tensors.items() if k not in wrong and not bool(torch.isfinite(v).all())]
    if wrong:
        raise AssetError(
            f"{path} does not fit its own description: {len(wrong)} tensors are missing, extra, of another "
            f"shape or hold NaN or Inf, first {', '.join(wrong[:5])}. {REMEDY}"
        )
    net.load_state_dict(dict(tensors))
