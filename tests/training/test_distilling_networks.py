"""Networks of a distillation: initial outputs, trainable parameters, gradients of each loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minikin.distillation.add import Adversarial
from minikin.distillation.features import PixelFeatures, augmented
from minikin.distillation.lcm import Consistency
from minikin.distillation.objective import DistillationContext, frozen_copy
from minikin.distillation.student import TARGETS, Texts
from minikin.distillation.tdm import DistributionMatching, follow
from minikin.errors import BadRecipe, NoNetwork
from minikin.models.base import Base
from minikin.training.config import StepContext
from minikin.training.networks import trainable_parameters
from tests.helpers.distillings import context

TURN = StepContext(0, 4, (7,))


def inputs(s: DistillationContext, n: int = 3) -> tuple[Tensor, Tensor, Texts]:
    x = torch.randn((n, *s.data.shape), generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([999, 400, 19])[:n], s.encoder(["a cat", "a dog in the snow", ""][:n])


def shaken(network: Any) -> None:
    """Changes every trainable parameter, as training would."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trainable_parameters(network):
            p.add_(0.05 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_student_starts_equal_to_teacher(bases: dict[str, Base], name: str) -> None:
    """Bit for bit, for a LoRA and a full copy; a trained LoRA that is disabled gives the teacher again."""
    s = context(bases[name], method="tdm")
    lora, full = s.copy("lora"), s.copy("full")
    x, t, texts = inputs(s)
    with s.base.frozen(), torch.no_grad():
        teacher_estimate = s.teacher(x, t, texts)
        for student in (lora, full):
            learns = trainable_parameters(student)
            for p in learns:  # on a CPU, PyTorch has other kernels for weights that ask for gradients
                p.requires_grad_(False)
            estimate = student(x, t, texts)
            assert torch.equal(teacher_estimate.x0, estimate.x0) and torch.equal(
                teacher_estimate.eps, estimate.eps
            )
            for p in learns:
                p.requires_grad_(True)
            shaken(student)
            assert not torch.equal(teacher_estimate.x0, student(x, t, texts).x0)
        lora.unet.disable_adapters()
        assert torch.equal(teacher_estimate.x0, lora(x, t, texts).x0)


def test_the_teacher_is_the_stock_unet(bases: dict[str, Base], pipelines: dict[str, Any]) -> None:
    """The raw prediction equals that of diffusers with plain encodings, so packing changes nothing."""
    s = context(bases["sd15"], method="tdm")
    x, t, texts = inputs(s)
    stock = pipelines["sd15"].unet
    with s.base.frozen(), torch.no_grad():
        expected = s.schedule.estimate(stock(x, t, texts.e).sample, x, t)
        assert torch.allclose(s.teacher(x, t, texts).x0, expected.x0, rtol=1e-5, atol=1e-4)


def test_the_lora_is_on_the_published_layers(bases: dict[str, Base]) -> None:
    s = context(bases["sd15"], method="lcm-lora")
    names = {n for n, _ in s.copy("lora").unet.named_parameters() if ".lora_A." in n}
    layers = [n for n, m in s.base.denoiser.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    expected = [n for n in layers if any(n.endswith(f".{t}") for t in TARGETS)]
    assert {n.removesuffix(".lora_A.default.weight") for n in names} == set(expected)
    assert not any(n.startswith(("conv_in", "conv_out", "time_embedding")) for n in names)


def test_cross_attention_projections_are_trained(bases: dict[str, Base]) -> None:
    """Gradients reach to_k and to_v of cross-attention through the packed tensor."""
    s = context(bases["sd15"], method="lcm-lora")
    c = Consistency(s)
    c.loss(TURN, c.draw(TURN))["loss"].backward()
    grads = {n: p.grad for n, p in c.student.unet.named_parameters() if "attn2" in n and ".lora_B." in n}
    for layer in ("to_k", "to_v"):
        layer_gradients = [g for n, g in grads.items() if layer in n]
        assert layer_gradients and all(g is not None and g.abs().sum() > 0 for g in layer_gradients)


def test_a_rank_larger_than_a_layer_is_refused(bases: dict[str, Base]) -> None:
    with pytest.raises(BadRecipe, match=r"rank 65 is larger than layer .* whose rank is (\d+)\. Use --rank \1"):
        context(bases["sd15"], method="tdm", rank=65).copy("lora")


def test_full_lcm_has_a_guidance_embedding(bases: dict[str, Base]) -> None:
    """The embedding is new, of width 256, and its input has an effect; all other weights are the teacher's."""
    s = context(bases["sd15"], method="lcm", guidance="3-15")
    c = Consistency(s)
    assert c.student.unet.config.time_cond_proj_dim == 256
    old = s.base.denoiser.state_dict()
    new = {k: v for k, v in c.student.unet.state_dict().items() if k != "time_embedding.cond_proj.weight"}
    assert new.keys() == old.keys() and all(torch.equal(new[k], old[k]) for k in old)
    x, t, texts = inputs(s)
    with torch.no_grad():
        x0, x0_other = (c.student(x, t, texts, torch.full((3,), w)).x0 for w in (2.0, 14.0))
    assert not torch.equal(x0, x0_other)


def test_target_network_is_an_ema(bases: dict[str, Base]) -> None:
    """target <- mu target + (1 - mu) student, and the target is part of the checkpoint."""
    s = context(bases["sd15"], method="lcm", target_ema=0.9)
    c = Consistency(s)
    assert c.target is not None
    before = [p.clone() for p in c.target.parameters()]
    shaken(c.student)
    c.after(TURN)
    for mine, old, its in zip(c.target.parameters(), before, c.student.parameters(), strict=True):
        assert torch.allclose(mine, 0.9 * old + 0.1 * its, atol=1e-6)
    assert any(k.startswith("target.") for k in c.networks.state_dict())
    assert not any(p.requires_grad for p in c.target.parameters())


def test_checkpoint_holds_trainable_tensors_only(bases: dict[str, Base]) -> None:
    """A LoRA's checkpoint holds the LoRA, not the frozen U-Net; loading restores it exactly."""
    s = context(bases["sd15"], method="lcm-lora")
    c = Consistency(s)
    state = {k: v.clone() for k, v in c.networks.state_dict().items()}
    assert state and all(".lora_" in k for k in state)
    shaken(c.student)
    c.networks.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in c.networks.state_dict().items())
    with pytest.raises(RuntimeError, match="1 tensors differ"):
        c.networks.load_state_dict(dict(list(state.items())[1:]))


# ---- gradients go where they belong ----------------------------------------------------------------


def gradient_of(objective: Any, name: str, module: Any) -> float:
    """Norm of the gradient of this loss in a module."""
    for p in objective.networks.parameters():
        p.grad = None
    objective.loss(TURN, objective.draw(TURN))[name].backward()
    return sum(float(p.grad.norm()) for p in trainable_parameters(module) if p.grad is not None)


def test_each_tdm_loss_reaches_one_network(bases: dict[str, Base]) -> None:
    m = DistributionMatching(context(bases["sd15"], method="tdm", gan=0.01))
    moved = {
        name: [gradient_of(m, name, module) > 0 for module in (m.student, m.fake, m.heads)]
        for name in ("student", "fake", "adversarial", "heads")
    }
    assert moved == {
        "student": [True, False, False],
        "fake": [False, True, False],
        "adversarial": [True, False, False],
        "heads": [False, True, True],
    }


def test_each_turbo_loss_reaches_one_network(bases: dict[str, Base]) -> None:
    a = Adversarial(context(bases["sd15"], method="turbo", student="lora"))
    with a.s.base.frozen():
        moved = {
            name: [gradient_of(a, name, module) > 0 for module in (a.student, a.heads)]
            for name in ("adversarial", "heads", "r1", "distillation")
        }
    assert moved == {
        "adversarial": [True, False],
        "heads": [False, True],
        "r1": [False, True],
        "distillation": [True, False],
    }


def test_discriminator_and_generator_losses_oppose(bases: dict[str, Base]) -> None:
    """A step against the heads' loss raises scores of real images over those of generated ones."""
    a = Adversarial(context(bases["sd15"], method="turbo", student="lora", distillation=0.0))
    batch = a.draw(TURN)
    first = a.loss(TURN, batch)["heads"]
    first.backward()
    with torch.no_grad():
        for p in trainable_parameters(a.heads):
            p -= 0.01 * p.grad / (p.grad.norm() + 1e-6)
    assert float(a.loss(TURN, batch)["heads"]) < float(first)


@pytest.mark.parametrize("kind", [Consistency, DistributionMatching, Adversarial])
def test_autocast_is_nearly_the_same_gradient(bases: dict[str, Base], kind: Any) -> None:
    """Teacher and student compute in bfloat16; weights and gradients stay float32 and point the same way."""
    s = context(
        bases["sd15"],
        method={Consistency: "lcm-lora", DistributionMatching: "tdm"}.get(kind, "turbo"),
        student="lora",
    )
    gradients = []
    for autocast in (False, True):
        objective = kind(DistillationContext.of(s.base, s.recipe, s.data, autocast=autocast))
        computed: set[torch.dtype] = set()
        hooks = [
            network.unet.conv_in.register_forward_hook(lambda _m, _i, out, to=computed: to.add(out.dtype))
            for network in (objective.s.teacher, objective.student)
        ]
        with s.base.frozen():
            shaken(objective.student)
            sum(objective.loss(TURN, objective.draw(TURN)).values()).backward()
        for hook in hooks:
            hook.remove()
        assert computed == {torch.bfloat16 if autocast else torch.float32}
        learns = [p for p in trainable_parameters(objective.student) if p.grad is not None]
        assert {t.dtype for p in learns for t in (p, p.grad)} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in learns]))
    exact, rounded = gradients
    assert not torch.equal(exact, rounded)
    same = torch.nn.functional.cosine_similarity(exact, rounded, dim=0)
    assert same > 0.8  # losses of untrained networks are differences of nearly equal numbers


# ---- IDA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "fake"), [("lora", "lora"), ("full", "full"), ("lora", "full")])
def test_fake_score_ema_follows_the_student(bases: dict[str, Base], student: str, fake: str) -> None:
    """With lambda near 0 the fake score becomes the student and gives equal images."""
    s = context(bases["sd15"], method="tdm", student=student, fake=fake, fake_ema=1e-9)
    m = DistributionMatching(s)
    shaken(m.student)
    x, t, texts = inputs(s)
    with torch.no_grad():
        assert (m.fake(x, t, texts).x0 - m.student(x, t, texts).x0).abs().max() > 1e-2
        m.after(TURN)
        assert (m.fake(x, t, texts).x0 - m.student(x, t, texts).x0).abs().max() < 2e-3
    assert len(follow(m.fake, m.student)) == len(trainable_parameters(m.fake))


def test_lora_fake_score_cannot_follow_a_full_student(bases: dict[str, Base]) -> None:
    with pytest.raises(BadRecipe, match="--fake full"):
        DistributionMatching(context(bases["sd15"], method="tdm", student="full", fake="lora", fake_ema=0.97))


# ---- pixels ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: Any) -> Path:
    """A miniature of DINOv2 with random weights."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return Path(folder)


def test_add_on_pixels(bases: dict[str, Base], dinov2: Path) -> None:
    """On decoded pixels, conditioned on prompt and image: student and heads get gradients, DINOv2 none."""
    a = Adversarial(context(bases["sd15"], method="turbo", student="lora", features=str(dinov2)))
    assert isinstance(a.features, PixelFeatures) and len(a.features.channels) == 5
    with a.s.base.frozen():
        losses = a.loss(TURN, a.draw(TURN))
        losses["loss"].backward()
    assert all(torch.isfinite(v) for v in losses.values())
    for module in (a.student, a.heads):
        assert sum(float(p.grad.norm()) for p in trainable_parameters(module) if p.grad is not None) > 0
    assert all(p.grad is None for p in a.features.model.parameters())


def test_missing_dinov2_is_not_downloaded(bases: dict[str, Base]) -> None:
    with pytest.raises(NoNetwork, match="--features teacher"):
        Adversarial(context(bases["sd15"], method="turbo", student="lora", features="dinov2"))


def test_augmentation_moves_cuts_and_can_be_differentiated() -> None:
    images = torch.ones(2, 3, 16, 16, requires_grad=True)
    still = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, 9.0, 9.0]] * 2)  # the hole is far outside
    assert torch.allclose(augmented(images, still), images)
    holed = augmented(images, torch.tensor([[0.5] * 7] * 2))
    assert float((holed == 0).float().mean()) == pytest.approx(49 / 256)
    moved = augmented(images, torch.tensor([[0.5, 0.5, 0.5, 0.99, 0.5, 9.0, 9.0]] * 2))
    assert float(moved[0, 0, 0].sum()) == 0 and float(moved[0, 0, -1].sum()) == 16
    moved.sum().backward()
    assert images.grad is not None and float(images.grad.sum()) > 0


def test_frozen_copy_shares_the_base(bases: dict[str, Base]) -> None:
    """The copy has separate weights but shares the base, so one pipeline stays in memory."""
    s = context(bases["sd15"], method="lcm")
    network = Consistency(s).student
    copy = frozen_copy(network)
    assert copy._base is network._base and copy.unet is not network.unet
    assert not trainable_parameters(copy) and trainable_parameters(network)
    x, t, texts = inputs(s)
    w = torch.full((len(x),), 3.0)
    with torch.no_grad():
        assert torch.equal(copy(x, t, texts, w).x0, network(x, t, texts, w).x0)
        shaken(network)
        assert not torch.equal(copy(x, t, texts, w).x0, network(x, t, texts, w).x0)
