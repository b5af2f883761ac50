"""Batch sizer: how many images fit into memory at once, from the memory that is free and bytes per pixel.

Bytes per pixel are first estimated from the autoencoder, whose last level at full size is the peak of
image generation, then measured with every batch from the first (the warm-up's) on. A batch that ran out of
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

SHARE = 0.8  # of free memory: other programs, and the allocator's fragments, need some
COPIES = 4  # of the widest level: its input, its norm, its output, the convolution's workspace
DECAY = 0.9  # per batch, of an older and larger measurement
LEAST = 0.25  # of the estimate: memory that the process keeps makes later batches look free
UNKNOWN = 8 << 20  # pixels per batch where the free memory is not known


class BatchSizer:
    """Memory estimate of one device.

    bytes_per_pixel  at first an estimate
    free             returns the bytes that may be allocated now, or None where that is not known
    peak             context manager that measures the peak memory inside it
    """

    def __init__(
        self, bytes_per_pixel: float, free: Callable[[], int | None], peak: Callable[[], Any]
    ) -> None:  # fmt: skip
        self.bytes_per_pixel, self._least = bytes_per_pixel, LEAST * bytes_per_pixel
        self._free, self._peak = free, peak

    @classmethod
    def for_base(cls, base: Base) -> BatchSizer:
        """The batch sizer of the device a base is on."""
        device: torch.device = base.device
        return cls(estimate(base), lambda: memory.free(device), lambda: memory.peak(device))

    def fits(self, pixels: int) -> int:
        """How many images of so many pixels each fit; at least 1, which is always tried."""
        free = self._free()
        most = UNKNOWN if free is None else SHARE * free / self.bytes_per_pixel
        return max(1, int(most // max(1, pixels)))

    @contextmanager
    def measuring(self, pixels: int) -> Iterator[None]:
        """Measure the batch that is generated inside, of so many pixels in all."""
        before = self._free()
        try:
            with self._peak() as peak:
                yield
        except OutOfMemory:
            if before is not None:
                self._record(before / pixels)
            raise
        if peak.bytes is not None and peak.before is not None:
            self._record((peak.bytes - peak.before) / pixels)

    def _record(self, bytes_per_pixel: float) -> None:
        self.bytes_per_pixel = max(bytes_per_pixel, DECAY * self.bytes_per_pixel, self._least)


def estimate(base: Base) -> float:
    """Bytes per pixel while an image is decoded."""
    config = base.vae.config
    widths = config.get("decoder_block_out_channels") or config.block_out_channels
    # the decoder's last level takes in the second of them at full size
    half = base.vae.dtype.itemsize < 4 and not config.get("force_upcast")
    return float(COPIES * widths[min(1, len(widths) - 1)] * (2 if half else 4))
