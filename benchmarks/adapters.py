"""Many LoRAs on tiny: switching and generating with 1 and with 20 loaded.

Goals: both cost the same with 20 loaded as with 1 (ratios in one run). The last row is the same
switch by diffusers' own set_adapters, for comparison.
"""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.measure import alternating, spread, timed
from minikin.models.base import Base
from minikin.models.loading.registry import open_base
from minikin.models.lora.adapters import Adapters
from minikin.models.lora.lora_file import Adapter

MANY, RANK, RUNS = 20, 16, 7
ENDINGS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".proj_in", ".proj_out", ".ff.net.0.proj", ".ff.net.2",
           ".conv1", ".conv2", ".conv_shortcut", ".time_emb_proj")  # fmt: skip


def random_lora(base: Base, seed: int) -> dict[str, Tensor]:
    """A LoRA on every layer an LCM-LoRA changes, in PEFT's names."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in base.denoiser.named_modules():
        if path.endswith(ENDINGS):
            out, *rest = module.weight.shape
            ones = [1] * (len(rest) - 1)
            tensors[f"unet.{path}.lora_A.weight"] = 0.02 * torch.randn(RANK, *rest, generator=g)
            tensors[f"unet.{path}.lora_B.weight"] = 0.02 * torch.randn(out, RANK, *ones, generator=g)
    return tensors


def run() -> list[dict[str, Any]]:
    base = open_base("tiny", device="cpu")
    few, many = Adapters(base), Adapters(base)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k}.safetensors" for k in range(MANY)]
        for k, path in enumerate(paths):
            save_file(random_lora(base, k), path)
        loading = timed(lambda: Adapters(base).get(paths[0]), 7)["median_ms"]
        single = [few.get(paths[0])]
        every = [many.get(path) for path in paths]
        theirs = _with_diffusers(folder, paths)

    def switching(among: list[Adapter], adapters: Adapters) -> Callable[[], None]:
        changes = itertools.cycle([[(a, w)] for a in among for w in (0.8, 0.7)])  # never the same twice

        def work() -> None:
            with adapters.using(next(changes)):
                pass

        return work

    t, kv = torch.tensor(499), torch.randn(1, base.n_tokens, base.layout.width)
    side = base.denoiser.config.sample_size
    x = torch.randn(1, base.denoiser.config.in_channels, side, side)

    def forward(adapters: Adapters, adapter: Adapter) -> Callable[[], None]:
        def work() -> None:
            with adapters.using([(adapter, 0.8)]), torch.no_grad():
                base.denoiser(x, t, kv)

        return work

    a, b = switching(single, few), switching(every, many)
    times = alternating(a, b, RUNS, 50)
    c, d = forward(few, single[0]), forward(many, every[7])
    steps = alternating(c, d, RUNS, 3)
    switch = sorted(m for _, m in times)[RUNS // 2]
    ratios, step_ratios = ([m / f for f, m in pairs] for pairs in (times, steps))
    return [
        {"what": f"load one LoRA of rank {RANK}", "value": f"{loading:.0f} ms"},
        {"what": f"switch LoRA, {MANY} loaded", "value": f"{switch:.2f} ms"},
        {"what": f"switch: {MANY} loaded / 1 (7 runs: least, median, most)", "value": spread(ratios),
         "bar": "about 1", "holds": sorted(ratios)[RUNS // 2] <= 1.1},
        {"what": f"U-Net with one in use: {MANY} loaded / 1", "value": spread(step_ratios),
         "bar": "about 1", "holds": sorted(step_ratios)[RUNS // 2] <= 1.1},
        {"what": f"the same switch by diffusers: 1 loaded, {MANY} loaded",
         "value": f"{theirs[0]:.0f}, {theirs[1]:.0f} ms"},
    ]  # fmt: skip


def _with_diffusers(folder: str, paths: list[Path]) -> tuple[float, float]:
    """Milliseconds of enable_lora, set_adapters, disable_lora with one and with all loaded."""
    pipe = open_base("tiny", device="cpu").pipe

    def switch() -> None:
        pipe.enable_lora()
        pipe.set_adapters(["s0"], [0.8])
        pipe.disable_lora()

    times = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, path in enumerate(paths):
            pipe.load_lora_weights(folder, weight_name=path.name, adapter_name=f"s{k}")
            if k in (0, len(paths) - 1):
                times.append(timed(switch, 5)["median_ms"])
    return times[0], times[1]
