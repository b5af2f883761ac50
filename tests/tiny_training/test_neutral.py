"""Neutral norms: distant pixels hardly change latents, and training keeps the constant."""

from __future__ import annotations

from typing import Any

import torch
from tools.tiny_training.autoencoder import build
from tools.tiny_training.neutral import freeze_constant, is_neutral, neutralise


def tiny(*, neutral: bool) -> Any:
    torch.manual_seed(0)
    model = build((16, 32, 64), 16, 64)
    if neutral:
        neutralise(model)
        freeze_constant(model)
    return model.eval()


@torch.no_grad()
def influence(model: Any) -> float:
    """Relative change of the latents at the left when pixels beyond their receptive field change."""
    left, right = torch.rand(1, 3, 128, 64), torch.rand(1, 3, 128, 192)
    black = torch.cat([left, torch.zeros_like(right)], -1)
    noisy = torch.cat([left, right * 2 - 1], -1)
    a, b = (model.encode(x).latent_dist.mean[..., :4] for x in (black, noisy))
    return float((a - b).std() / a.std())


def test_distant_pixels_hardly_change_latents() -> None:
    """Control: with diffusers' initial weights they do."""
    assert influence(tiny(neutral=True)) < 0.05 < influence(tiny(neutral=False))


def test_training_keeps_the_constant() -> None:
    model = tiny(neutral=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(3):
        x = torch.rand(2, 3, 32, 32)
        (model(x).sample - x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    for part in ("encoder", "decoder"):
        for name in (f"{part}.conv_in.bias", f"{part}.conv_norm_out.weight"):
            assert after[name][0] == before[name][0]
            assert not torch.equal(after[name], before[name])
    name = "encoder.down_blocks.0.downsamplers.0.conv.weight"
    assert not after[name][0].any() and not after[name][:, 0].any()
    assert is_neutral(model) and not is_neutral(tiny(neutral=False))
