"""The edit against its closed form in float64 with a real CLIP covariance, and bugs of other implementations.

The covariance is CLIP ViT-L/14's (D = 768, condition number 3.9e3) if its file is there; otherwise
one with the same spectrum.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from minikin.errors import BadRecipe
from minikin.perfusion import edit
from minikin.perfusion.edit import Direction
from minikin.perfusion.gate import OPEN, Gate

D, N_OUT = 768, 320
REAL = Path(__file__).parents[3] / "shared" / "data" / "clip_vit_l14_covariance.safetensors"


@pytest.fixture(scope="module")
def c() -> Tensor:
    """C (768, 768) float64."""
    if REAL.exists():
        from safetensors.torch import load_file

        return next(iter(load_file(REAL).values())).double()
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    spectrum = torch.logspace(0, 3.6, D, dtype=torch.float64)  # 1 .. 4e3
    return q @ torch.diag(spectrum) @ q.T


@pytest.fixture(scope="module")
def m(c: Tensor) -> Tensor:
    return torch.linalg.inv(c)


def vectors(c: Tensor, n: int, seed: int = 1) -> Tensor:
    """n encodings with the covariance C, float64."""
    g = torch.Generator().manual_seed(seed)
    factor = torch.linalg.cholesky(c)
    return (factor @ torch.randn(D, n, generator=g, dtype=torch.float64)).T


def direction(i_star: Tensor, c_inv: Tensor, category: Tensor) -> Direction:
    return Direction(i_star, c_inv @ i_star, category)


def directions(c: Tensor, m: Tensor, n: int, seed: int = 2) -> list[Direction]:
    i_stars, categories = vectors(c, n, seed), vectors(c, n, seed + 100)
    return [direction(i.float(), m.float(), k.float()) for i, k in zip(i_stars, categories, strict=True)]


def test_open_edit_is_the_constrained_least_squares_solution(c: Tensor, m: Tensor) -> None:
    """W' = W + (o* - W i*) a^T (ROME): the open gate must equal it, and W' i* = o*."""
    w = torch.randn(N_OUT, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (d,) = directions(c, m, 1)
    i_star, category = d.i_star.double(), d.category.double()
    delta = torch.randn(N_OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    o_star = w @ category + delta
    a = m @ i_star / (i_star @ m @ i_star)
    w_edited = w + torch.outer(o_star - w @ i_star, a)
    e = vectors(c, 40)
    done = edit.edit_encodings(e[None].float(), [d], [OPEN])
    ours = done.encodings[0].double() @ w.T + done.gates[0][0].double()[:, None] * delta
    assert torch.dist(ours, e @ w_edited.T) / torch.dist(e @ w_edited.T, torch.zeros(())) < 1e-4
    at_i = edit.edit_encodings(i_star[None, None].float(), [d], [OPEN])
    assert torch.allclose(at_i.encodings[0, 0].double(), category, atol=1e-2 * category.abs().max())
    assert torch.allclose(w_edited @ i_star, o_star)


def test_gated_edit_matches_float64(c: Tensor, m: Tensor) -> None:
    """y(e) = W e_perp + sum_j g_j o_j with three concepts, against float64 by Cholesky and QR."""
    ds = directions(c, m, 3)
    gates = [Gate(0.7, 0.15), Gate(0.6, 0.1), Gate(0.75, 0.1)]
    e = torch.cat([vectors(c, 20), torch.stack([d.i_star.double() for d in ds])])
    factor = torch.linalg.cholesky(m)
    basis = torch.linalg.qr(factor.T @ torch.stack([d.i_star.double() for d in ds]).T)[0]
    u = torch.linalg.solve(factor.T, basis)  # u_j^T M u_k = delta_jk: the paper's appendix B
    expected = e - (e @ m @ u) @ u.T
    for d, g in zip(ds, gates, strict=True):
        i = d.i_star.double()
        s = (e @ m @ i) / (i @ m @ i)
        expected = expected + torch.sigmoid((s - g.beta) / g.tau)[:, None] * d.category.double()
    ours = edit.edit_encodings(e[None].float(), ds, gates).encodings[0].double()
    assert torch.dist(ours, expected) / torch.dist(expected, torch.zeros(())) < 1e-4


def test_residual_has_no_similarity_left(c: Tensor, m: Tensor) -> None:
    """s_j(e_perp) = 0 for both concepts: the metric must be in the projection.

    lucidrains' Cholesky path leaves it out and errs by a factor of 12; its default path skips
    the Gram matrix and errs by 3 %.
    """
    ds = directions(c, m, 2)
    ds[1] = direction(0.6 * ds[0].i_star + 0.8 * ds[1].i_star, m.float(), ds[1].category)
    rest = edit.perpendicular(vectors(c, 30).float(), ds)
    for d in ds:
        assert edit.similarity(rest, d).abs().max() < 1e-4
    naive = vectors(c, 30).float()
    naive = naive - sum(edit.similarity(naive, d)[:, None] * d.i_star for d in ds)
    assert edit.similarity(naive, ds[0]).abs().max() > 1e-2  # the shortcut does fail this test


def test_scale_of_c_does_not_matter(c: Tensor, m: Tensor) -> None:
    """C -> kC changes nothing, so the normaliser of C is irrelevant."""
    (d,) = directions(c, m, 1)
    other = direction(d.i_star, (m / 37).float(), d.category)
    e = vectors(c, 10).float()[None]
    a, b = (edit.edit_encodings(e, [x], [Gate(0.7, 0.15)]).encodings for x in (d, other))
    assert torch.dist(a, b) / a.norm() < 1e-5


@pytest.mark.parametrize(
    ("beta", "tau", "s", "expected"),
    [(0.75, 0.10, 0.8, 0.623), (0.70, 0.15, 1.0, 0.881), (0.60, 0.15, 0.6, 0.5), (0.50, 0.15, 0.2, 0.119)],
)
def test_gate_values(beta: float, tau: float, s: float, expected: float) -> None:
    """Perfusion's Eq. 3 at a few points."""
    assert abs(float(edit.gate(torch.tensor(s), Gate(beta, tau))) - expected) < 1e-3


def test_strength_is_monotone_and_one_changes_nothing() -> None:
    """<tom:w>: the gate value rises with w at every similarity; w = 1 returns the gate unchanged."""
    g = Gate(0.7, 0.15)
    assert edit.strength_gate(g, 1.0) == g
    s = torch.linspace(-0.5, 1.5, 21)
    values = torch.stack([edit.gate(s, edit.strength_gate(g, w)) for w in (0, 0.25, 0.5, 0.8, 1, 1.3, 2)])
    assert (values.diff(dim=0) >= 0).all()
    at_concept = torch.tensor(1.0)
    half, full = (float(edit.gate(at_concept, edit.strength_gate(g, w))) for w in (0.5, 1.0))
    assert abs(half - 0.5 * full) < 1e-6
    assert float(edit.gate(at_concept, edit.strength_gate(g, 0.0))) < 1e-6


@pytest.mark.parametrize("strength", [-0.1, 2.5, float("nan")])
def test_absurd_strength_is_refused(strength: float) -> None:
    with pytest.raises(BadRecipe, match="between 0 and 2"):
        edit.strength_gate(Gate(0.7, 0.15), strength)


def test_tau_must_be_positive() -> None:
    with pytest.raises(BadRecipe, match="tau must be greater than 0"):
        Gate(0.7, 0.0)


def test_masked_tokens_keep_their_encodings(c: Tensor, m: Tensor) -> None:
    """With positions "own", a token outside the mask keeps its encoding, bit for bit."""
    (d,) = directions(c, m, 1)
    e = vectors(c, 6).float()[None]
    mask = torch.tensor([[0, 0, 1, 0, 0, 0.0]])
    done = edit.edit_encodings(e, [d], [Gate(0.2, 0.2)], [mask])
    assert torch.equal(done.encodings[0, [0, 1, 3, 4, 5]], e[0, [0, 1, 3, 4, 5]])
    assert not torch.equal(done.encodings[0, 2], e[0, 2])
    assert done.gates[0][0, [0, 1, 3, 4, 5]].abs().max() == 0


def test_gradient_reaches_i_star_straight_through(c: Tensor, m: Tensor) -> None:
    """The running average must pass the gradient of the concept's encoding (not CDY's .data write)."""
    e_concept = vectors(c, 1)[0].float().requires_grad_()
    average = vectors(c, 1, seed=9)[0].float()
    i_star = average + e_concept - e_concept.detach()
    d = Direction(i_star, m.float() @ i_star, average)
    edit.edit_encodings(vectors(c, 4).float()[None], [d], [Gate(0.7, 0.15)]).encodings.sum().backward()
    assert e_concept.grad is not None and e_concept.grad.abs().max() > 0
