"""Training and generation at true SD 1.5 and SDXL size in bfloat16, random weights.

    python -m benchmarks.gpu --json result.json
    python -m benchmarks.gpu --miniature --device cpu     a quick check that the script runs

For each family: one training step and a whole run of 200 steps at batch 16 (goal on an H100: <= 30 s for SD 1.5
at 512 px), text-to-image in 1, 4 and 30 steps against stock diffusers, peak memory.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import machine
from minikin import Studio
from minikin.images.photos import Photo
from minikin.models.base import Base
from minikin.perfusion.covariance import Covariance
from minikin.perfusion.train import teach
from minikin.recipes import Teach

CASES = (("sd15", 512), ("sdxl", 1024))
PAINT_STEPS = (1, 4, 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", choices=[c for c, _ in CASES])
    parser.add_argument("--miniature", action="store_true", help="tiny layers, to check the script")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine() | {"device": _device_name(args.device)}, "rows": []}
    print(json.dumps(results["machine"]))
    for family, side in CASES:
        if args.only in (None, family):
            results["rows"] += _family(family, 64 if args.miniature else side, args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def _family(family: str, side: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    base = _base(family, args)
    rows: list[dict[str, Any]] = []

    def say(what: str, value: float, unit: str) -> None:
        rows.append({"family": family, "side_px": side, "what": what, "value": round(value, 4), "unit": unit})
        print(f"{family:5} {side:5} px  {what:42} {value:10.3f} {unit}", flush=True)

    photos = [
        Photo(str(k), np.random.default_rng(k).integers(0, 255, (side, side, 3), dtype=np.uint8))
        for k in range(5)
    ]
    unit = Covariance(torch.eye(base.layout.text_width, dtype=torch.float64), 1, 1)
    _reset_peak(args.device)
    # SDXL at 1024 px does not fit a batch of 16 beside its activations on 80 GB
    batch = args.batch if family == "sd15" else max(1, args.batch // 4)
    times: list[float] = []
    recipe = Teach(name="tom", category="cat", steps=args.steps, batch=batch, size=side, mask="none")
    start = last = time.perf_counter()
    for event in teach(base, photos, recipe, unit):
        if type(event).__name__ == "Progress":
            _wait(args.device)
            now = time.perf_counter()
            times.append(now - last)
            last = now
    steady = sorted(times[len(times) // 4 :])
    say(f"one training step, batch {batch}", steady[len(steady) // 2], "s")
    say(f"training, {args.steps} steps with preparation", time.perf_counter() - start, "s")
    say("peak memory of training", _peak(args.device), "GB")
    _paint(base, side, args, say)
    return rows


def _paint(base: Base, side: int, args: argparse.Namespace, say: Any) -> None:
    studio = Studio(base)
    _reset_peak(args.device)
    for steps in PAINT_STEPS:
        for guidance, label in ((1.0, "no guidance"), (6.0, "guided")):
            what = f"{steps} steps, {label}"

            def ours(steps: int = steps, guidance: float = guidance) -> None:
                studio.paint("a cat on the beach", steps=steps, guidance=guidance, width=side, height=side)

            def theirs(steps: int = steps, guidance: float = guidance) -> None:
                base.pipe("a cat on the beach", num_inference_steps=steps, guidance_scale=guidance,
                          width=side, height=side)  # fmt: skip

            say(f"text-to-image, {what}", 1e3 * _median(ours, args.device), "ms")
            say(f"stock diffusers, {what}", 1e3 * _median(theirs, args.device), "ms")
    say("peak memory of text-to-image", _peak(args.device), "GB")


def _base(family: str, args: argparse.Namespace) -> Base:
    from benchmarks.memory import full_size
    from minikin.models.loading import architectures

    if args.miniature:
        full = architectures.ARCHITECTURES[family]
        architectures.ARCHITECTURES[family] = architectures.shrunk(full)
        base: Base = full_size(family)
        architectures.ARCHITECTURES[family] = full
    else:
        base = full_size(family)
    base.pipe.to(args.device, getattr(torch, args.dtype))
    return base


def _median(work: Any, device: str, repeats: int = 5) -> float:
    times = []
    for k in range(repeats + 2):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if k >= 2:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else float("nan")


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


if __name__ == "__main__":
    main()
