"""DreamBooth-LoRA: DreamBooth with a low-rank change of attention (Hu et al. 2021, arXiv:2106.09685).

Trained: up and down factors on to_q, to_k, to_v and to_out of every attention, alpha = rank, the first
factor drawn from a normal distribution and the second zero, as diffusers' script sets PEFT.
Prompts: as DreamBooth's.
File: pytorch_lora_weights.safetensors with PEFT's names, 3.2 MB for SD 1.5 at rank 4, for
`pipe.load_lora_weights` and for Minikin's own <lora:...>.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from minikin.baselines.method import Method, TrainedTensors
from minikin.baselines.result import BaselineResult
from minikin.baselines.sizes import Shapes
from minikin.baselines.student import Student, partial_copy
from minikin.errors import BadRecipe
from minikin.files import atomic_write
from minikin.models.base import Base
from minikin.models.lora import lora_file
from minikin.models.lora.lora_file import LowRank
from minikin.recipes import Baseline

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_LAYER = re.compile(r"(.*\.attn[12]\.(?:to_q|to_k|to_v|to_out\.0))\.weight")


class DreamBoothLora(Method):
    def student(self, base: Base, recipe: Baseline, word: str) -> Student:
        from peft import LoraConfig

        shapes = {n: tuple(p.shape) for n, p in base.denoiser.named_parameters()}
        name, most = min(((n, min(s)) for n, s in _layers(shapes).items()), key=lambda layer: layer[1])
        if recipe.rank > most:
            raise BadRecipe(
                f"A LoRA of rank {recipe.rank} is larger than layer {name} of this base, whose rank is {most}. "
                f"Use --rank {most} or less."
            )
        unet: Any = partial_copy(base.denoiser)
        config = LoraConfig(
            r=recipe.rank, lora_alpha=recipe.rank, init_lora_weights="gaussian", target_modules=list(TARGETS)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            unet.add_adapter(config)
        for p in unet.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        return Student(base, unet)

    def tensors(self, student: Student) -> TrainedTensors:
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(student.unet, adapter_name="default")
        state = {k: v.detach().float().cpu().clone() for k, v in state.items()}
        layers = [k.removesuffix(".lora_A.weight") for k in state if k.endswith(".lora_A.weight")]
        return TrainedTensors(
            pairs={n: LowRank(state[f"{n}.lora_A.weight"], state[f"{n}.lora_B.weight"]) for n in layers}
        )

    def write(self, base: Base, result: BaselineResult, folder: Path) -> list[Path]:
        from safetensors.torch import save

        tensors = {
            f"unet.{layer}.lora_{ab}.weight": t
            for layer, pair in result.pairs.items()
            for ab, t in zip("AB", pair, strict=True)
        }
        return [atomic_write(folder / LORA_WEIGHT_NAME_SAFE, save(tensors, {"format": "pt"}))]

    def read(self, base: Base, folder: Path, name: str) -> TrainedTensors:
        layers = lora_file.load(base, folder / LORA_WEIGHT_NAME_SAFE, name).pairs
        return TrainedTensors(pairs={n: LowRank(*(t.float() for t in p)) for (_, n), p in layers.items()})

    def count(self, shapes: Shapes, rank: int) -> int:
        return sum(rank * (a + b) for a, b in _layers(shapes.unet).values())


def _layers(shapes: Any) -> dict[str, tuple[int, int]]:
    """The layers a LoRA is put on and their widths (out, in)."""
    return {m[1]: shapes[n] for n in shapes if (m := _LAYER.fullmatch(n))}
