"""Miniatures with fewer levels, for what does not depend on how many there are."""

from __future__ import annotations

from dataclasses import replace

from minikin.models.loading.architectures import Architecture


def two_levels(a: Architecture) -> Architecture:
    """Of a U-Net's levels the first and the last: a third of the layers, with every kind of block."""
    names = "block_out_channels down_block_types up_block_types attention_head_dim transformer_layers_per_block"
    lists = {k: a.unet[k] for k in names.split() if isinstance(a.unet.get(k), list)}
    return replace(a, unet=a.unet | {k: [v[0], v[-1]] for k, v in lists.items()})
