"""Painting imports nothing that it does not need, and everything put off works when it is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from minikin import lazy_imports

PAINT = """
import sys
from minikin import lazy_imports
lazy_imports.install()
from minikin import Studio
studio = Studio.open("tiny", device="cpu")
image = studio.paint("a photo of a cat", steps=1)[0]
"""
UNNEEDED = (
    "torch._dynamo torch._inductor peft scipy.stats.distributions scipy.optimize scipy.integrate._quadrature "
    "sklearn pandas matplotlib openvino ray fastapi minikin.tiny.world "
    "diffusers.models.transformers.flux2_transformer_2d"
)
LATER = """
import torch
from diffusers.loaders.lora_base import BaseTunerLayer
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
import transformers.masking_utils as masks

# a package's own names
from diffusers.models.transformers import DiTTransformer2DModel
from diffusers.hooks import apply_layerwise_casting
import diffusers.hooks, diffusers.models.autoencoders as autoencoders
assert apply_layerwise_casting is diffusers.hooks.layerwise_casting.apply_layerwise_casting
assert autoencoders.AsymmetricAutoencoderKL.__name__ in dir(autoencoders)
try:
    diffusers.hooks.no_such_name
except AttributeError as e:
    assert "diffusers.hooks" in str(e)
else:
    raise AssertionError

# names of scipy
from diffusers import DPMSolverMultistepScheduler, LMSDiscreteScheduler
DPMSolverMultistepScheduler(use_beta_sigmas=True).set_timesteps(4)
lms = LMSDiscreteScheduler()
lms.set_timesteps(4)
lms.get_lms_coefficient(1, 0, 0)
from transformers.loss import loss_for_object_detection
assert loss_for_object_detection.linear_sum_assignment([[0, 1], [1, 0]])[0].tolist() == [0, 1]

# peft: stock LoRA, its strength, layerwise casting
small = diffusers.UNet2DConditionModel(
    block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
x = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 32)
assert not isinstance(small, BaseTunerLayer)
from peft import LoraConfig
small.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_k", "to_v"]))
assert any(isinstance(m, BaseTunerLayer) for m in small.modules())
with torch.no_grad():
    full = small(*x).sample
    half = small(*x, cross_attention_kwargs={"scale": 0.5}).sample
    assert not torch.equal(full, half) and torch.equal(full, small(*x).sample)
    small.disable_adapters()
    plain = small(*x).sample
    assert not torch.equal(full, plain)
    # torch.compile: marks of classes, the libraries' own code in models, and the same numbers
    import torch._dynamo
    from torch._dynamo import trace_rules
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    assert id(Attention) in trace_rules._allowed_callable_ids
    assert id(BasicTransformerBlock) in trace_rules._allowed_callable_ids
    assert masks.TransformGetItemToIndex is TransformGetItemToIndex
    compiled = torch.compile(small, backend="eager")
    assert torch.allclose(compiled(*x).sample, plain, atol=1e-5)
    assert diffusers.utils.torch_utils.is_compiled_module(compiled)
small.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
assert small(*x).sample.isfinite().all()
"""


def run(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_painting_imports_only_what_it_needs() -> None:
    """The compiler, peft and scipy take longer to import than an image takes."""
    assert run(f"{PAINT}\nprint([m for m in {UNNEEDED.split()} if m in sys.modules])") == "[]"


@pytest.mark.slow
def test_what_was_put_off_works_after_an_image() -> None:
    """Stock schedulers, LoRAs, layerwise casting and torch.compile, in a process that has painted."""
    run(PAINT + LATER)


def test_loaded_modules_and_unforeseen_names_are_the_real_ones() -> None:
    names = {"json": ("loads",), "colorsys": ("rgb_to_hls",)}
    sys.modules.pop("colorsys", None)
    with lazy_imports._stand_ins(names):
        assert sys.modules["json"] is json
        from colorsys import rgb_to_hls

        assert type(sys.modules["colorsys"]) is not type(json)
    assert "colorsys" not in sys.modules
    assert rgb_to_hls(1, 1, 1) == (0, 1, 0)
    del sys.modules["colorsys"]
    with lazy_imports._stand_ins(names):
        from colorsys import hls_to_rgb

        assert hls_to_rgb(0, 1, 0) == (1, 1, 1)
    assert type(sys.modules["colorsys"]) is type(json)
