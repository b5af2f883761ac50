"""A U-Net that begins with the weights of a trained one: `python -m tools.tiny_training.grow`.

The trained U-Net has one level less and reads latents of half the side. Its levels become the inner levels of
the new one; the new first level, and the layers that join it to them, begin as in `unet.build`. So the layouts
and the meaning of words that the trained one has learned need not be learned again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

STEPS = 1000  # timesteps at which the embeddings are matched


def grown(small: Any, large: Any) -> list[str]:
    """Copy what fits from `small` to `large`, which has a level more and a time embedding of equal width.

    Returns the names of the tensors of `large` that keep their own values.
    """
    old, new = small.state_dict(), large.state_dict()
    fresh = []
    for name, tensor in new.items():
        source = _inner(name, len(small.config.block_out_channels))
        if source in old and old[source].shape == tensor.shape:
            tensor.copy_(old[source])
        else:
            fresh.append(name)
    weight, bias = _time_embedding(small, large)
    new["time_embedding.linear_1.weight"].copy_(weight)
    new["time_embedding.linear_1.bias"].copy_(bias)
    return [name for name in fresh if not name.startswith("time_embedding.linear_1.")]


def _inner(name: str, levels: int) -> str:
    """The name in the smaller U-Net of a tensor in the larger; "" for the first level's.

    down_blocks are numbered from the first level, up_blocks from the innermost.
    """
    if name.startswith(("conv_in.", "conv_out.", "conv_norm_out.", "down_blocks.0.", f"up_blocks.{levels}.")):
        return ""
    return re.sub(r"^down_blocks\.(\d+)", lambda m: f"down_blocks.{int(m[1]) - 1}", name)


@torch.no_grad()
def _time_embedding(small: Any, large: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the larger's linear_1 that give the smaller's outputs, by least squares."""
    t = torch.arange(STEPS)
    target = small.time_embedding.linear_1(small.time_proj(t)).double()
    features = large.time_proj(t).double()
    features = torch.cat([features, torch.ones(STEPS, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(features, target, driver="gelsd").solution.T.float()
    return solution[:, :-1], solution[:, -1]


def main(
    source: Annotated[Path, typer.Argument(help="diffusers folder of the trained model, such as tiny's own")],
    out: Annotated[Path, typer.Argument(help="folder of the build; gets the folder grown")],
    world: Annotated[str, typer.Option(help="small, rich or wide")] = "rich",
) -> None:
    """Write OUT/grown/unet; train it with `python -m tools.tiny_training --from OUT/grown --stage unet`."""
    from diffusers import UNet2DConditionModel
    from tools.tiny_training.job import save_part
    from tools.tiny_training.recipes import recipe
    from tools.tiny_training.unet import build

    r = recipe(world, "cpu")
    small = UNet2DConditionModel.from_pretrained(source / "unet", torch_dtype=torch.float32)
    side = 2 * small.config.sample_size
    large = build(
        r.unet, (r.autoencoder.latents, side), r.text.width, small.time_embedding.linear_2.out_features
    )
    fresh = grown(small, large)
    save_part(large, out / "grown" / "unet")
    typer.echo(f"{out / 'grown'}: {len(fresh)} tensors begin anew: {', '.join(fresh)}")


if __name__ == "__main__":
    typer.run(main)
