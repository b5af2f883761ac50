"""Few-step generation at true SD 1.5 and SDXL size, end to end, with the share of every part.

    python -m benchmarks.gpu.fewstep --json result.json
    python -m benchmarks.gpu.fewstep --miniature --device cpu     a quick check that the script runs

Random weights in bfloat16: speed does not depend on their values. Each case runs eagerly and
compiled, by Minikin and by the stock diffusers pipeline in the same run, with the base's own decoder and
with a tiny one (AutoencoderTiny, the size of TAESD). Goals on an H100 with the tiny decoder: SDXL 1 step
at 512 px <= 25 ms (SDXL-Turbo's paper: 207 ms on an A100), SD 1.5 LCM 4 steps at 512 px <= 45 ms.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.__main__ import _base, _device_name, _median
from benchmarks.measure import machine
from benchmarks.time_shares import PARTS, shares
from minikin import Studio
from minikin.models.base import Base

# family, scheduler, steps, side, goal in ms (eager or compiled, tiny decoder)
CASES = (
    ("sdxl", "Euler a", 1, 512, 25.0), ("sdxl", "LCM", 4, 512, None), ("sdxl", "LCM", 4, 1024, None),
    ("sd15", "LCM", 4, 512, 45.0), ("sd15", "Euler a", 1, 512, None),
)  # fmt: skip
PROMPT = "a photo of a cat on the beach"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--only", choices=("sd15", "sdxl"))
    parser.add_argument("--backends", nargs="*", default=["eager", "compile"])
    parser.add_argument("--miniature", action="store_true", help="tiny layers, to check the script")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"machine": machine() | {"device": _device_name(args.device)}, "rows": []}
    print(json.dumps(results["machine"]))
    for family in ("sd15", "sdxl"):
        if args.only in (None, family):
            base = _base(family, args)
            for decoder in ("own", "tiny"):
                if decoder == "tiny":
                    base.pipe.vae = tiny_decoder(args)
                for case in CASES:
                    if case[0] == family:
                        results["rows"] += measure(base, case, decoder, args)
            del base
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def measure(base: Base, case: Any, decoder: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One case with every backend, and the stock pipeline."""
    family, scheduler, steps, side, goal = case
    side = 64 if args.miniature else side
    studio, rows = Studio(base), []
    recipe = {"scheduler": scheduler, "steps": steps, "guidance": 1.0, "width": side, "height": side}

    def theirs() -> None:
        base.pipe(PROMPT, num_inference_steps=steps, guidance_scale=1.0, width=side, height=side,
                  generator=torch.Generator().manual_seed(1))  # fmt: skip

    stock = 1e3 * _median(theirs, args.device)
    for backend in args.backends:

        def ours(backend: str = backend) -> None:
            studio.paint(PROMPT, seed=1, backend=backend, **recipe)

        ours()  # compiles before anything is measured
        times = shares(base.pipe, ours, 9)
        row = {
            "case": f"{family} {scheduler}, {steps} step{'s' * (steps > 1)}, {side} px, {decoder} decoder",
            "backend": backend, "ms": round(1e3 * _median(ours, args.device), 2), "stock_ms": round(stock, 2),
            **{f"{p}_ms": round(times[p], 2) for p in (*PARTS, "rest")},
            "goal_ms": goal if decoder == "tiny" else None,
        }  # fmt: skip
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items() if v is not None), flush=True)
    return rows


def tiny_decoder(args: argparse.Namespace) -> Any:
    """An autoencoder of TAESD's size (1.2 million weights a side), random weights."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny().to(args.device, getattr(torch, args.dtype)).eval()


if __name__ == "__main__":
    main()
