"""Time of an image by part: U-Net, decoder, text encoder, and everything else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

PARTS = ("text", "U-Net", "decoder")


@contextmanager
def clocked(pipe: Any, spent: dict[str, float]) -> Iterator[None]:
    """Inside, `spent` grows by the seconds of each part of a diffusers pipeline."""
    parts = {"U-Net": [pipe.unet], "decoder": [pipe.vae.decoder],
             "text": [t for t in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if t]}  # fmt: skip
    with ExitStack() as stack:
        for name, modules in parts.items():
            for module in modules:
                stack.enter_context(_clock(module, name, spent))
        yield


@contextmanager
def _clock(module: Any, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Time by hooks, so that a replaced forward is timed, too."""
    started: list[float] = []

    def before(*_: Any) -> None:
        wait(module)
        started.append(time.perf_counter())

    def after(*_: Any) -> None:
        wait(module)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - started.pop()

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def wait(module: Any) -> None:
    if next(module.parameters()).device.type == "cuda":
        torch.cuda.synchronize()


def shares(pipe: Any, work: Callable[[], Any], repeats: int = 15, warm_up: int = 3) -> dict[str, float]:
    """Medians in milliseconds of `work` as a whole ("all"), of each part, and of the rest."""
    rows: list[dict[str, float]] = []
    for k in range(warm_up + repeats):
        spent: dict[str, float] = {}
        with clocked(pipe, spent):
            wait(pipe.unet)
            start = time.perf_counter()
            work()
            wait(pipe.unet)
            spent["all"] = time.perf_counter() - start
        spent["rest"] = spent["all"] - sum(spent.get(p, 0.0) for p in PARTS)
        if k >= warm_up:
            rows.append(spent)
    return {
        name: 1e3 * statistics.median(row.get(name, 0.0) for row in rows) for name in (*PARTS, "rest", "all")
    }


def as_text(times: dict[str, float]) -> str:
    """One line: U-Net 12.1 ms, decoder 3.4 ms, ..."""
    return ", ".join(f"{name} {times[name]:.1f}" for name in (*PARTS, "rest"))
