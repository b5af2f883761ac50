"""A U-Net that begins with the weights of one of a level less."""

from __future__ import annotations

import torch
from tools.tiny_training.grow import grown
from tools.tiny_training.recipes import Unet
from tools.tiny_training.unet import build


def test_inner_levels_and_time_are_those_of_the_smaller() -> None:
    torch.manual_seed(0)
    small = build(Unet(channels=(32, 64), convolutional=0, groups=8), (8, 4), 16)
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    large = build(Unet(channels=(16, 32, 64), groups=8), (4, 8), 16, small.time_embedding.linear_2.out_features)
    before = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    fresh = grown(small, large)
    old, new = small.state_dict(), large.state_dict()
    for inner, outer in (
        ("mid_block", "mid_block"),
        ("down_blocks.1", "down_blocks.2"),
        ("up_blocks.0", "up_blocks.0"),
    ):
        for name in (name for name in old if name.startswith(inner + ".")):
            assert torch.equal(new[outer + name.removeprefix(inner)], old[name]), name
    to_k = "attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(new[f"down_blocks.1.{to_k}"], old[f"down_blocks.0.{to_k}"])
    assert fresh and all(torch.equal(new[name], before[name]) for name in fresh)
    assert {name.split(".")[0] for name in fresh} == {
        "conv_in", "conv_out", "conv_norm_out", "down_blocks", "up_blocks"
    }  # fmt: skip
    t = torch.arange(0, 1000, 37)
    embedded = [unet.time_embedding(unet.time_proj(t)) for unet in (small, large)]
    # 8 frequencies for 16; of two networks that share nothing, the cosine is near 0
    assert torch.nn.functional.cosine_similarity(*embedded).min() > 0.85
