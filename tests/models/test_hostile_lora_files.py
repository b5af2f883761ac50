"""LoRA files of strangers: what is no ordinary file, too much, or not finite is refused, and nothing waits."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minikin.errors import BadAdapterFile, BadModelFile, BaseMismatch
from minikin.models.base import Base
from minikin.models.loading.single_file import read_header
from minikin.models.lora import adapters, lora_file
from tests.helpers.loras import random_lora, write


@pytest.mark.parametrize("name", ["pipe", "folder", "zero"])
def test_what_is_no_ordinary_file(bases: dict[str, Base], tmp_path: Path, name: str) -> None:
    """A pipe that nobody writes to, a folder, a device without end: refused at once, not waited for."""
    path = tmp_path / f"{name}.safetensors"
    if name == "pipe":
        os.mkfifo(path)
    elif name == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(BadAdapterFile, match=r"is no file|cannot be read"):
        lora_file.load(bases["sd15"], path, name)
    assert not adapters.is_lora(path)
    with pytest.raises(BadModelFile, match="There is no file"):
        read_header(path)


def test_too_much(bases: dict[str, Base], tmp_path: Path, monkeypatch: Any) -> None:
    """Bytes, a header, tensors: each told with its limit; the same file within them is read."""
    base = bases["sd15"]
    path = write(tmp_path / "a.safetensors", random_lora(base, layers=("conv1",)))
    assert lora_file.load(base, path, "a").layers
    for limit, value, words in (("MAX_BYTES", 1000, "more than 1000 bytes"), ("MAX_HEADER", 100, "a header of"),
                                ("MAX_TENSORS", 3, "tensors, more than 3")):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(lora_file, limit, value)
            with pytest.raises(BadAdapterFile, match=words):
                lora_file.load(base, path, "a")
    empty = {f"lora{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(20_001)}
    header = json.dumps(empty).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(BadAdapterFile, match="20,001 tensors, more than 20,000"):
        lora_file.load(base, path, "a")


def test_a_file_that_is_cut_off_while_it_is_used(bases: dict[str, Base], tmp_path: Path) -> None:
    """Nothing is mapped: tensors that were read stay what they are (a map would end the process, SIGBUS)."""
    path = write(tmp_path / "a.safetensors", random_lora(bases["sd15"], layers=("conv1",)))
    tensors, _, _ = lora_file._read(path)
    before = {k: t.clone() for k, t in tensors.items()}
    os.truncate(path, 0)
    assert all(torch.equal(t, before[k]) for k, t in tensors.items())


KEY = "unet.mid_block.resnets.0.conv1"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{KEY}.alpha": torch.tensor(3e38)}, "a scale of .* is not finite"),
        ({f"{KEY}.alpha": torch.tensor([1.0, 2.0])}, "alpha or rank of .* cannot be read"),
        ({f"{KEY}.lora_B.weight": torch.ones(4)}, "alpha or rank of .* cannot be read"),
        ({f"{KEY}.lora_B.weight": torch.ones(4, 0)}, "alpha or rank of .* cannot be read"),
        ({f"{KEY}.lora_B.weight": torch.full((4, 2), float("inf"))}, "NaN or Inf"),
        ({f"{KEY}.lora_B.weight": torch.full((4, 2), float("nan")).to(torch.float8_e4m3fn)}, "NaN or Inf"),
    ],
    ids=["huge alpha", "two alphas", "a line", "rank 0", "infinity", "NaN in 8 bits"],
)
def test_numbers(bases: dict[str, Base], tmp_path: Path, changes: Any, words: str) -> None:
    pair = {f"{KEY}.lora_A.weight": torch.ones(2, 4), f"{KEY}.lora_B.weight": torch.full((4, 2), 100.0)}
    save_file({**pair, **changes}, tmp_path / "a.safetensors")
    with pytest.raises(BadAdapterFile, match=words):
        lora_file.load(bases["sd15"], tmp_path / "a.safetensors", "a")


@pytest.mark.parametrize("settings", ["[]", '{"lora_alpha": NaN}', '{"lora_alpha": "x"}', "[" * 100_000, ""])
def test_settings_beside_a_file(bases: dict[str, Base], tmp_path: Path, settings: str) -> None:
    """PEFT's adapter_config.json: none of these ends in another error than ours."""
    path = write(tmp_path / "adapter_model.safetensors", random_lora(bases["sd15"], layers=("conv1",)))
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(BadAdapterFile, match=r"cannot be read|is not finite"):
        lora_file.load(bases["sd15"], path, "a")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [({"lora_up.weight": (64, 2, 1, 1), "lora_mid.weight": (3, 2, 3, 3), "lora_down.weight": (2, 64, 1, 1)},
      "ranks that do not fit"),
     ({"lora_up.weight": (64, 2, 1, 1), "lora_mid.weight": (2, 5, 3, 3), "lora_down.weight": (2, 64, 1, 1)},
      "do not fit together"),
     ({"lora_up.weight": (64, 9999), "lora_mid.weight": (9999, 1, 1, 1), "lora_down.weight": (1, 64)},
      "ranks that do not fit"),
     ({"hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (64, 2), "hada_w2_b": (2, 576)},
      "does not fit"),
     ({"lokr_w1": (8, 8), "lokr_w2": (8, 9, 3, 3)}, "does not fit"),
     ({"lokr_w1": (8,), "lokr_w2": (8,)}, "does not fit"),
     ({"diff": (64, 64)}, "does not fit"),
     ({"diff_b": (3,)}, "does not fit"),
     ({"weight": (7,), "on_input": ()}, "does not fit"),
     ({"diff": (64, 64, 3, 3), "dora_scale": (5, 1, 1, 1)}, "does not fit"),
     ({"w_norm": (3,)}, "does not fit"),
     ({"diff": (64, 64, 3, 3), "lokr_w1": (8, 8)}, "belong to no pair")],
)  # fmt: skip
def test_factors_that_do_not_fit(bases: dict[str, Base], tmp_path: Path, tensors: Any, words: str) -> None:
    """Of kinds other than LoRA too: refused before anything of their size is computed."""
    tensors_by_key = {f"{KEY}.{k}": torch.ones(shape) for k, shape in tensors.items()}
    save_file(tensors_by_key, tmp_path / "a.safetensors")
    with pytest.raises((BadAdapterFile, BaseMismatch), match=words):
        lora_file.load(bases["sd15"], tmp_path / "a.safetensors", "a")
