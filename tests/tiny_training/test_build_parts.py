"""The parts of the embedded model's training: files of images, worker processes, the noise, the networks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tools.tiny_training.autoencoder import build as build_autoencoder
from tools.tiny_training.latents import tokenise
from tools.tiny_training.noise import STEPS, Levels, scheduler
from tools.tiny_training.normalise import normalise
from tools.tiny_training.pool import spread
from tools.tiny_training.recipes import recipe
from tools.tiny_training.shards import Shards, write

from minikin.errors import AssetError, BadRecipe, OutOfMemory
from minikin.models.loading import registry
from minikin.tiny.captions import caption
from minikin.tiny.world import World

pytestmark = pytest.mark.usefixtures("one_thread")


def test_damaged_image_files_are_named(tmp_path: Path) -> None:
    shards = Shards(tmp_path, 8, 4, {"world": "small"})
    for i in range(2):
        write(shards.path(i), np.full((4, 2), i, np.uint8))
    assert shards[np.array([0, 7, 3])].tolist() == [[0, 0], [1, 1], [0, 0]]
    shards.path(1).write_bytes(shards.path(1).read_bytes()[:-3])
    again = Shards(tmp_path, 8, 4, {"world": "small"})
    with pytest.raises(AssetError, match=r"00001.npy cannot be read .* Delete this one file"):
        again.all()
    shards.path(1).unlink()
    assert Shards(tmp_path, 8, 4, {"world": "small"}).missing() == [1]
    with pytest.raises(BadRecipe, match="made from something else: world is small there and wide now"):
        Shards(tmp_path, 8, 4, {"world": "wide"})


def test_worker_processes(tmp_path: Path) -> None:
    """They do the same as this process; one that is ended from outside is told."""
    calls = [(tmp_path / str(i), np.arange(i)) for i in range(3)]
    assert list(spread(write, calls, 2)) == [1, 2, 3]
    assert np.load(tmp_path / "2").tolist() == [0, 1]
    with pytest.raises(OutOfMemory, match="worker process was ended from outside.*fewer than --workers 1"):
        list(spread(os._exit, [(1,)], 1))


def test_normalising_changes_latents_only() -> None:
    """Decoding what was encoded gives what it gave before; channels end with mean 0 and unit total."""
    torch.manual_seed(0)
    vae = build_autoencoder((4, 8), 3, 32).eval()
    x = torch.rand(8, 3, 32, 32) * 2 - 1
    out, _ = normalise(vae, x, torch.autocast("cpu", enabled=False))
    with torch.no_grad():
        was = vae.decode(vae.encode(x).latent_dist.mean).sample
        z = out.encode(x).latent_dist
        now = out.decode(z.mean).sample
        assert torch.allclose(was, now, atol=1e-4)
        assert z.mean.mean((0, 2, 3)).abs().max() < 1e-4
        assert float(z.mean.std((0, 2, 3)).pow(2).mean()) == pytest.approx(1, rel=1e-3)
        before = vae.encode(x).latent_dist
        ratio, ratio_after = (q.logvar.exp() / q.mean.var((0, 2, 3), keepdim=True) for q in (before, z))
        assert torch.allclose(ratio, ratio_after, rtol=1e-2)  # the posterior's relative width too


def test_captions_are_of_the_scenes_that_were_drawn(tmp_path: Path) -> None:
    """With many variants of a background a scene that was drawn anew takes another turn: both must know."""
    world, other = World("small", 40), World("small", 1)
    assert any(world.scene(0, i).things != other.scene(0, i).things for i in range(60))  # why it matters
    path = tmp_path / "ids.npy"
    file = Path(str(registry.tiny_folder())) / "tokenizer" / "tokenizer.json"
    tokenise(path, file, "small", 0, 60, 0, 1, 32, 40, None)
    fast = FastTokenizer.from_file(str(file))
    for i, row in enumerate(np.load(path)):
        text = caption(world.scene(0, i), np.random.default_rng((0, i, 0))).text
        ids = fast.encode(text).ids[:8]
        assert row[0].tolist()[: len(ids)] == ids


def test_timesteps_follow_the_recipe() -> None:
    """Three quarters by a Laplace law of log-SNR: its median and its mean distance from it."""
    levels = Levels(scheduler().alphas_cumprod, uniform=0.25, centre=0.3, spread=0.8)
    t = levels.draw(4000, torch.Generator().manual_seed(0))
    assert t.shape == (4000,) and 0 <= int(t.min()) and int(t.max()) < STEPS
    only = Levels(scheduler().alphas_cumprod, uniform=0, centre=0.3, spread=0.8)
    log_snr = only.log_snr[only.draw(4000, torch.Generator().manual_seed(0))]
    assert float(log_snr.median()) == pytest.approx(0.3, abs=0.02)
    assert float((log_snr - 0.3).abs().mean()) == pytest.approx(0.8, abs=0.03)


def test_v_is_the_schedulers(tmp_path: Path) -> None:
    ddim = scheduler()
    levels = Levels(ddim.alphas_cumprod, uniform=0.25, centre=0.3, spread=0.8)
    x0, eps, t = torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4), torch.tensor([0, 10, 500, 900, 999])
    x_t, v = levels.mix(x0, eps, t)
    assert torch.allclose(x_t, ddim.add_noise(x0, eps, t), atol=1e-6)
    assert torch.allclose(v, ddim.get_velocity(x0, eps, t), atol=1e-6)


def test_presets() -> None:
    """On a GPU all budgets together leave time for the rest; the wide U-Net still fits into 60 MB."""
    for world in ("small", "rich", "wide"):
        gpu, cpu = recipe(world, "gpu"), recipe(world, "cpu")
        plans = (
            gpu.autoencoder.plan,
            gpu.text.plan,
            gpu.unet.plan,
        )
        assert sum(p.minutes or 99 for p in plans) <= 16
        assert all(p.steps and not p.minutes for p in (cpu.text.plan, cpu.unet.plan, cpu.autoencoder.plan))
    from tools.tiny_training.unet import build

    n = sum(p.numel() for p in build(recipe("wide", "gpu").unet, (16, 16), 256).parameters())
    assert 2 * n + 15e6 < 60e6
