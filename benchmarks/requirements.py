"""Weights and operations of each base at its true size, calculated on the meta device.

    python -m benchmarks.requirements

    weights     U-Net, text encoders and autoencoder in 16 bits
    paint       25 steps with guidance (two U-Net evaluations per step) and decoding
    teach       400 steps of 8 photos: a forward pass, its repetition by gradient checkpointing, and the
                gradient with respect to the inputs, each about as expensive as a forward pass

Times are operations divided by 50 TFLOP/s, which an RTX 4090 or an A100 reaches in practice in 16 bits. The
numbers for memory do not contain activations.
"""

from __future__ import annotations

import json
from typing import Any

import diffusers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from minikin.models.loading.architectures import ARCHITECTURES

BASES = {"sd15": 512, "sd21": 768, "sdxl": 1024}
STEPS, TEACH_STEPS, TEACH_BATCH = 25, 400, 8
RATE = 50e12  # operations per second


def requirements(name: str, side: int) -> dict[str, Any]:
    """Bytes of the weights in 16 bits, and operations of painting and teaching."""
    a = ARCHITECTURES[name]
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**a.unet)
        vae = diffusers.AutoencoderKL(**a.vae)
        texts = [transformers.CLIPTextModel(transformers.CLIPTextConfig(**t)) for t in a.texts]
        latents = torch.empty(1, 4, side // 8, side // 8)
        more = {}
        if a.unet.get("addition_embed_type") == "text_time":
            more = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        text = torch.empty(1, 77, a.unet["cross_attention_dim"])
        unet_flops = _flops(lambda: unet(latents, torch.ones(1), text, added_cond_kwargs=more))
        decode_flops = _flops(lambda: vae.decode(latents))
    parameters = sum(p.numel() for m in (unet, vae, *texts) for p in m.parameters())
    return {
        "base": name, "side_px": side, "weights_gb": round(2 * parameters / 1e9, 2),
        "unet_tflop": round(unet_flops / 1e12, 2),
        "paint_s": round((2 * STEPS * unet_flops + decode_flops) / RATE, 1),
        "teach_min": round(3 * TEACH_STEPS * TEACH_BATCH * unet_flops / RATE / 60, 1),
    }  # fmt: skip


def _flops(work: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return int(counter.get_total_flops())


if __name__ == "__main__":
    for name, side in BASES.items():
        print(json.dumps(requirements(name, side)))
