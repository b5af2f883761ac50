"""Wrappers of the U-Net: applied from the inside out, undone in reverse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minikin.generation.initial_latents import InitialLatents
from minikin.generation.tiling import TiledDiffusion
from minikin.generation.unet_wrappers import unet_wrappers
from minikin.models.backends import forward_replaced
from minikin.models.base import Base
from minikin.models.regions import Box, Region, RegionBias


class Recorder:
    """An inference backend that notes the shapes it gets, and the region bias that is set meanwhile."""

    name = "recorder"

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.biases: list[object] = []

    @contextmanager
    def applied(self, base: Any, warn: Any = None) -> Iterator[None]:
        def forward(sample: torch.Tensor, *_: Any, **__: Any) -> Any:
            self.shapes.append(tuple(sample.shape))
            self.biases.append(base.layer.region_bias)
            return (sample[:, :4],)

        with forward_replaced(base.denoiser, forward):
            yield


class Unet(torch.nn.Module):
    """As much of an inpainting U-Net as the wrappers touch."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.config, self.attn2 = SimpleNamespace(out_channels=4), torch.nn.Module()
        self.attn2.forward = layer

    def forward(self, sample: torch.Tensor, *_: Any, **__: Any) -> Any:
        raise AssertionError("the backend replaces this")


@pytest.fixture
def base() -> Any:
    layer = SimpleNamespace(region_bias=None)
    return SimpleNamespace(denoiser=Unet(layer), layer=layer, is_inpainting=True, vae_scale_factor=8)


def wrappers(base: Base, backend: Any) -> Any:
    initial = InitialLatents(torch.zeros(1, 4, 8, 8), 1.0, masked_latents=torch.zeros(1, 4, 8, 8), tile=4)
    regions = [Region(Box(0, 0, 0.5, 1), torch.ones(3))]
    tiles = TiledDiffusion((8, 8), 4, regions, copies=1)
    outer = RegionBias(regions, 1, (8, 8))
    return unet_wrappers(base, backend, print, region_bias=outer, tiles=tiles, initial=initial)


def test_order_is_inputs_tiles_regions_backend(base: Any) -> None:
    """Tiles are cut from all nine channels, each with its region bias; the backend sees one at a time."""
    backend = Recorder()
    with wrappers(base, backend):
        (prediction,) = base.denoiser(torch.ones(1, 4, 8, 8), 1, return_dict=False)
    assert prediction.shape == (1, 4, 8, 8)
    assert set(backend.shapes) == {(1, 9, 4, 4)} and len(backend.shapes) == 9
    assert all(isinstance(b, RegionBias) for b in backend.biases) and len({id(b) for b in backend.biases}) == 9


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_everything_is_undone(base: Any, error: type[Exception] | None) -> None:
    try:
        with wrappers(base, Recorder()):
            assert "forward" in base.denoiser.__dict__ and base.layer.region_bias is not None
            if error:
                raise error
    except RuntimeError:
        pass
    assert "forward" not in base.denoiser.__dict__ and base.layer.region_bias is None
