"""PixArt: the published configurations, and miniatures of them with random weights.

Sources: diffusers' scripts/convert_pixart_alpha_to_diffusers.py and convert_pixart_sigma_to_diffusers.py, and
the configuration of google/t5-v1_1-xxl. Alpha has Stable Diffusion's autoencoder, Sigma has SDXL's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_TRANSFORMER: dict[str, Any] = {
    "num_layers": 28, "attention_head_dim": 72, "num_attention_heads": 16, "cross_attention_dim": 1152,
    "in_channels": 4, "out_channels": 8, "patch_size": 2, "attention_bias": True, "sample_size": 128,
    "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 4096,
}  # fmt: skip
T5_XXL: dict[str, Any] = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
}  # fmt: skip
SCHEDULER = {
    "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "algorithm_type": "dpmsolver++",
    "solver_order": 2, "prediction_type": "epsilon",
}  # fmt: skip


@dataclass(frozen=True)
class PixArt:
    """A published model: pipeline class of diffusers, transformer, scale of the autoencoder's latents."""

    pipeline: str
    transformer: dict[str, Any]
    scaling_factor: float


PUBLISHED = {
    "pixart-alpha": PixArt(
        "PixArtAlphaPipeline", _TRANSFORMER | {"use_additional_conditions": True}, 0.18215
    ),
    "pixart-alpha-512": PixArt(
        "PixArtAlphaPipeline", _TRANSFORMER | {"sample_size": 64, "use_additional_conditions": False}, 0.18215
    ),
    "pixart-sigma": PixArt(
        "PixArtSigmaPipeline",
        _TRANSFORMER | {"interpolation_scale": 2, "use_additional_conditions": False}, 0.13025,
    ),
}  # fmt: skip


def miniature(name: str, seed: int = 0) -> Any:
    """A pipeline of two narrow layers with random weights; images of 64 px are within its size."""
    import diffusers
    import transformers

    torch.manual_seed(seed)
    published = PUBLISHED[name]
    tokenizer = _tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=24, d_kv=6, d_ff=48, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    alpha = bool(published.transformer["use_additional_conditions"])
    transformer = diffusers.PixArtTransformer2DModel(
        **published.transformer | {
            "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 4, "cross_attention_dim": 48,
            "caption_channels": 24, "sample_size": 128 if alpha else 8, "interpolation_scale": 1,
        }
    )  # fmt: skip
    for p in transformer.parameters():
        torch.nn.init.normal_(p, std=0.15)
    levels = 2 if alpha else 4  # the size of alpha's images counts as 1024 px for latents of 128
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16)[-levels:], layers_per_block=1, norm_num_groups=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        scaling_factor=published.scaling_factor,
    )  # fmt: skip
    pipe = getattr(diffusers, published.pipeline)(
        tokenizer=tokenizer, text_encoder=transformers.T5EncoderModel(config).eval(), vae=vae.eval(),
        transformer=transformer.eval(), scheduler=diffusers.DPMSolverMultistepScheduler(**SCHEDULER),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tokenizer() -> Any:
    """A T5 tokenizer of single characters and a few words."""
    import transformers

    words = "a an the photo image of cat dog teddy bear on in at beach night snow and good close up".split()
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    characters = [(c, -8.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789,.:;'!?-()"]
    return transformers.T5Tokenizer(vocab=special + characters + [(f"▁{w}", -3.0) for w in words], extra_ids=0)
