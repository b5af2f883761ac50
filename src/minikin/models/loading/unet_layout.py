"""Layouts of U-Nets that were distilled from SDXL's: SSD-1B, Segmind Vega and the like.

They have the same blocks with fewer transformer layers, some of different number within one block, and none in
the middle. The layout is read from the tensors' names, as ComfyUI does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from minikin.models.loading.architectures import Architecture

_BLOCK = re.compile(r"model\.diffusion_model\.(input_blocks|middle_block|output_blocks)\.(\d+)\.(.*)")
_TRANSFORMER = re.compile(r"(?:1\.)?transformer_blocks\.(\d+)\.")
LARGEST = 32  # layers of a block and blocks, more than any model has


def with_layout(a: Architecture, names: Iterable[str]) -> Architecture:
    """The architecture with as many layers and transformer layers as the tensors' names say.

    names  of all tensors; those of a header that is no whole U-Net change nothing
    """
    depths: dict[str, dict[int, int]] = {"input_blocks": {}, "middle_block": {}, "output_blocks": {}}
    for name in names:
        if match := _BLOCK.match(name):
            kind, number, rest = match[1], int(match[2]), match[3]
            layer = _TRANSFORMER.match(rest)
            depth = int(layer[1]) + 1 if layer else 0
            depths[kind][number] = max(depth, depths[kind].get(number, 0))
    down, middle, up = depths.values()
    levels = len(a.unet["block_out_channels"])
    whole = sorted(down) == list(range(len(down))) and sorted(up) == list(range(len(up)))
    most = max([*down.values(), *middle.values(), *up.values()], default=0)
    if not whole or not down or len(down) % levels or len(up) != len(down) or max(most, len(down)) > LARGEST:
        return a
    step = len(down) // levels  # the layers of a block, and its down- or upsampler
    layers = step - 1
    downs = [_of_block([down.get(1 + b * step + j, 0) for j in range(layers)]) for b in range(levels)]
    ups = [_of_block([up.get(b * step + j, 0) for j in range(step)]) for b in range(levels)]
    changes: dict[str, Any] = {"layers_per_block": layers, "transformer_layers_per_block": downs}
    if ups != downs[::-1]:
        changes["reverse_transformer_layers_per_block"] = ups
    if not middle.get(1):
        changes["mid_block_type"] = "UNetMidBlock2D"
    if all(a.unet.get(k) == v for k, v in changes.items()):
        return a
    return replace(a, unet=a.unet | changes)


def _of_block(depths: list[int]) -> int | list[int]:
    """One number where all layers of a block agree; blocks without attention have 1, which nothing reads."""
    return max(1, depths[0]) if len(set(depths)) == 1 else depths
