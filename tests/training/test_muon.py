"""Muon: matrices move by the orthogonal part of their momentum, the rest as AdamW moves them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minikin.training import muon
from minikin.training.muon import Muon, matrices, orthogonal


@pytest.mark.parametrize(
    ("unit", "close"), [("amx_bf16", 0.1), ("none", 1e-4)]
)  # float32 where bfloat16 is slow
@pytest.mark.parametrize("shape", [(64, 64), (64, 300), (300, 64)])
def test_orthogonal_keeps_the_directions_and_levels_the_sizes(shape, unit, close, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    g = u @ torch.diag(torch.logspace(0, -1, 64)) @ v
    inside = u.T @ orthogonal(g) @ v.T
    sizes = inside.diagonal()
    assert ((sizes > 0.6) & (sizes < 1.35)).all()
    assert (inside - torch.diag(sizes)).abs().max() < close


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(),
                         nn.Linear(64 * 4, 96), nn.LayerNorm(96), nn.Linear(96, 5))  # fmt: skip


def test_only_wide_layers_are_matrices():
    model = small()
    assert [tuple(w.shape) for w in matrices(model)] == [(64, 64, 3, 3), (96, 256)]
    model[2].weight.requires_grad_(False)
    assert len(matrices(model)) == 1


def test_the_rest_moves_as_adamw_moves_it():
    a, b = small(), small()
    b.load_state_dict(a.state_dict())
    x = torch.randn(8, 3, 4, 4)
    ours = Muon(a.parameters(), matrices(a), lr=1e-2, weight_decay=0.1)
    plain = torch.optim.AdamW(b.parameters(), lr=1e-2, weight_decay=0.1)
    for model, optimizer in ((a, ours), (b, plain)):
        model(x).square().mean().backward()
        optimizer.step()
    wide = {id(w) for w in matrices(a)}
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q) == (id(p) not in wide)
        assert p.grad is not None  # put back: what reads gradients after a step still finds them


def test_one_move_is_the_formula():
    torch.manual_seed(2)
    w = nn.Parameter(torch.randn(64, 128))
    before, gradient = w.detach().clone(), torch.randn(64, 128)
    w.grad = gradient.clone()
    Muon([w], [w], lr=0.1, weight_decay=0.5).step()
    ahead = gradient.lerp(gradient * (1 - muon.MOMENTUM), muon.MOMENTUM)
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 128**0.5 * orthogonal(ahead)
    assert torch.allclose(w, expected, atol=1e-6)
