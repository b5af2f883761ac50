"""Peak memory of training at the true size of SD 1.5, batch 1, float32 (goal: <= 6.5 GB).

Random weights, in a process of its own. About a minute.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

CODE = """
import json, resource, sys, time
from benchmarks.memory import full_size
from minikin.perfusion.covariance import Covariance
from minikin.recipes import Teach
from minikin.images.photos import Photo
from minikin.perfusion.train import teach
import numpy as np, torch
base = full_size("sd15")
photo = Photo("a", np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8))
c = Covariance(torch.eye(768, dtype=torch.float64), 1, 1)
recipe = Teach(name="tom", category="cat", batch=1, steps=2, mask="none")
start = time.time()
done = list(teach(base, [photo], recipe, c))[-1]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps({"peak_gb": peak, "seconds": time.time() - start, "values": done.result.n_values}))
"""


def full_size(name: str) -> Any:
    """A base of the true architecture with random weights, in float32 on the CPU."""
    import tempfile
    from pathlib import Path

    import diffusers
    import torch
    import transformers

    from minikin.models.base import Base
    from minikin.models.loading.architectures import ARCHITECTURES, write_configs

    a = ARCHITECTURES[name]
    with tempfile.TemporaryDirectory() as folder:
        configs = write_configs(a, Path(folder))
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "unet": _random(diffusers.UNet2DConditionModel, a.unet),
            "vae": _random(diffusers.AutoencoderKL, a.vae),
            "scheduler": diffusers.DDIMScheduler.from_config(a.scheduler),
        }
        for k, tail in enumerate(["", "_2"][: len(a.texts)]):
            cls = transformers.CLIPTextModelWithProjection if k else transformers.CLIPTextModel
            parts[f"text_encoder{tail}"] = cls(transformers.CLIPTextConfig(**a.texts[k]))
            parts[f"tokenizer{tail}"] = transformers.CLIPTokenizer.from_pretrained(configs / f"tokenizer{tail}")
    if a.name != "sdxl":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, a.pipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return Base(pipe, name)


def _random(kind: Any, config: dict[str, Any]) -> Any:
    """A network of diffusers with random weights of the usual size, 1 / sqrt(inputs of a unit) at most.

    All are parts of one block of random numbers: generating SD 1.5's separately takes four times as long.
    """
    import torch

    with torch.device("meta"):
        network = kind.from_config(config)
    network.to_empty(device="cpu")
    block = torch.rand(2**22) * 2 - 1
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim == 1:  # norms and biases are the identity
                p.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            for piece in p.view(-1).split(len(block)):
                torch.mul(block[: len(piece)], p[0].numel() ** -0.5, out=piece)
    return network


def run() -> list[dict[str, Any]]:
    out = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    result = json.loads(out.strip().splitlines()[-1])
    gb = result["peak_gb"]
    return [{"what": f"peak memory, SD 1.5 at 512 px, batch 1 ({result['seconds']:.0f} s for two steps)",
             "value": f"{gb:.2f} GB", "bar": "<= 6.5 GB", "holds": gb <= 6.5}]  # fmt: skip
