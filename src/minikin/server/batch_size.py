"""How many images fit into memory at once: what is free now, by what a pixel takes.

What a pixel takes is estimated from the autoencoder, whose last level at full size is the peak of
painting, and measured with every batch from the first (the warm-up's) on. A batch that ran out of
memory counts as one that needed more than there was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minikin.errors import OutOfMemory
from minikin.models import memory
from minikin.models.base import Base

SHARE = 0.8  # of what is free: other programs, and an allocator's odd pieces, need some
COPIES = 4  # of the widest level: what goes in, its norm, what comes out, the convolution's own
FADE = 0.9  # a batch that needed less lets the rest of an older, larger measure count so far
LEAST = 0.25  # of the estimate: memory that a process holds back makes later batches look free
UNKNOWN = 8 << 20  # pixels, where nothing tells what is free


class Room:
    """Of one device.

    per_pixel  bytes, at first an estimate
    free       bytes that may be taken now, or None where nothing tells
    peak       measures the most that was needed inside
    """

    def __init__(
        self, per_pixel: float, free: Callable[[], int | None], peak: Callable[[], Any]
    ) -> None:  # fmt: skip
        self.per_pixel, self._least = per_pixel, LEAST * per_pixel
        self._free, self._peak = free, peak

    @classmethod
    def of(cls, base: Base) -> Room:
        """Of the device a base is on."""
        device: torch.device = base.device
        return cls(estimate(base), lambda: memory.free(device), lambda: memory.peak(device))

    def fits(self, pixels: int) -> int:
        """Images of so many pixels each; at least one, for which nothing but trying is left."""
        free = self._free()
        most = UNKNOWN if free is None else SHARE * free / self.per_pixel
        return max(1, int(most // max(1, pixels)))

    @contextmanager
    def measuring(self, pixels: int) -> Iterator[None]:
        """Inside, a batch of so many pixels in all is painted."""
        before = self._free()
        try:
            with self._peak() as found:
                yield
        except OutOfMemory:
            if before is not None:
                self._needed(before / pixels)
            raise
        if found.bytes is not None and found.before is not None:
            self._needed((found.bytes - found.before) / pixels)

    def _needed(self, per_pixel: float) -> None:
        self.per_pixel = max(per_pixel, FADE * self.per_pixel, self._least)


def estimate(base: Base) -> float:
    """Bytes a pixel takes while it is decoded."""
    config = base.vae.config
    widths = config.block_out_channels  # the decoder's last level takes in the second of them at full size
    half = base.vae.dtype.itemsize < 4 and not config.force_upcast
    return float(COPIES * widths[min(1, len(widths) - 1)] * (2 if half else 4))
