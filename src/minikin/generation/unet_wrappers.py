"""Everything that wraps the U-Net while images are sampled, in one ordered list.

    1. inference backend   replaces `forward` of U-Net and decoder (compiled or exported code)
    2. region bias         is set on the cross-attention layers (`<tom@left>`)
    3. tiled diffusion     replaces `forward`: one call becomes one for each tile, with the tile's region bias
    4. inpainting inputs   replaces `forward`: mask and masked image are appended to the latents, 9 channels

The order is from the inside out: a call of the U-Net passes 4, 3, 2, 1. So tiles are cut from all nine
channels, and the backend sees one tile at a time. `unet_wrappers` applies them in this order and undoes them in
reverse. LoRAs are not in this list: they change layers, not calls (`models.lora.adapters`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from minikin.generation.initial_latents import InitialLatents
from minikin.generation.tiling import TiledDiffusion
from minikin.models import backends
from minikin.models.backends import forward_replaced
from minikin.models.base import Base
from minikin.models.regions import RegionBias, region_bias_applied

Forward = Callable[..., Any]


@contextmanager
def unet_wrappers(
    base: Base,
    backend: backends.Backend,
    warn: Callable[[str], None],
    *,
    region_bias: RegionBias | None = None,
    tiles: TiledDiffusion | None = None,
    initial: InitialLatents | None = None,
) -> Iterator[None]:
    """Inside, the base's U-Net has these wrappers; see the module's text."""
    wrappers: list[AbstractContextManager[Any]] = [
        backend.applied(base, warn),
        region_bias_applied(base.denoiser, region_bias),
    ]
    if tiles:
        wrappers.append(_wrapped_forward(base, lambda forward: tiles.wrap(base, forward)))
    if initial and base.is_inpainting:
        wrappers.append(_wrapped_forward(base, lambda forward: with_inpainting_inputs(initial, forward)))
    with ExitStack() as stack:
        for wrapper in wrappers:
            stack.enter_context(wrapper)
        yield


@contextmanager
def _wrapped_forward(base: Base, wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    with forward_replaced(base.denoiser, wrap(base.denoiser.forward)):
        yield


def with_inpainting_inputs(initial: InitialLatents, forward: Forward) -> Forward:
    """A forward that appends mask (1 channel) and masked image (C channels) to the latents."""
    latents = initial.masked_latents
    assert latents is not None
    mask = latents.new_ones(1, 1, *initial.size) if initial.mask is None else initial.mask

    def with_inputs(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = torch.cat([mask.to(sample), latents.to(sample)], 1).expand(len(sample), -1, -1, -1)
        return forward(torch.cat([sample, inputs], 1), *args, **kwargs)

    return with_inputs
