"""SANA and SANA-Sprint: the published configurations, and miniatures of them with random weights.

Sources: diffusers' scripts/convert_sana_to_diffusers.py and convert_dcae_to_diffusers.py; the config.json of
Efficient-Large-Model/Sana_1600M_1024px_diffusers and of Sana_Sprint_0.6B_1024px_diffusers (queries and keys are
normalised, guidance is an input); the configuration of google/gemma-2-2b-it.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch

_SANA_600M: dict[str, Any] = {
    "in_channels": 32, "out_channels": 32, "num_layers": 28, "num_attention_heads": 36,
    "attention_head_dim": 32, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152, "caption_channels": 2304, "mlp_ratio": 2.5, "attention_bias": False,
    "sample_size": 32, "patch_size": 1, "norm_elementwise_affine": False, "norm_eps": 1e-6,
}  # fmt: skip
_SANA_1600M = _SANA_600M | {
    "num_attention_heads": 70, "num_layers": 20, "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112, "cross_attention_dim": 2240,
}  # fmt: skip
_SPRINT = {"guidance_embeds": True, "guidance_embeds_scale": 0.1, "qk_norm": "rms_norm_across_heads"}
DC_AE: dict[str, Any] = {
    "latent_channels": 32, "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3] * 6,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "conv", "upsample_block_type": "interpolate", "scaling_factor": 0.41407,
}  # fmt: skip
GEMMA_2B: dict[str, Any] = {
    "hidden_size": 2304, "num_hidden_layers": 26, "intermediate_size": 9216, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256_000, "query_pre_attn_scalar": 256,
}  # fmt: skip
FLOW = {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
TRIG_FLOW = {"num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5}


@dataclass(frozen=True)
class Sana:
    """A published model: pipeline class of diffusers, transformer, layers and their width."""

    pipeline: str
    transformer: dict[str, Any]
    n_layers: int
    width: int


PUBLISHED = {
    "sana-600m": Sana("SanaPipeline", _SANA_600M, 28, 1152),
    "sana": Sana("SanaPipeline", _SANA_1600M, 20, 2240),
    "sana-sprint-600m": Sana("SanaSprintPipeline", _SANA_600M | _SPRINT, 28, 1152),
    "sana-sprint": Sana("SanaSprintPipeline", _SANA_1600M | _SPRINT, 20, 2240),
}


def miniature(name: str, seed: int = 0) -> Any:
    """A pipeline of two narrow layers with random weights; images of 64 px are its size.

    SANA and SANA-Sprint of one seed have the same text encoder and projection of text.
    """
    import diffusers
    import transformers

    torch.manual_seed(seed)
    published = PUBLISHED[name]
    tokenizer = _tokenizer()
    config = transformers.Gemma2Config(
        **GEMMA_2B | {
            "vocab_size": len(tokenizer), "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 48,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 6,
        },
    )  # fmt: skip
    text_encoder = transformers.Gemma2Model(config).eval()
    transformer = diffusers.SanaTransformer2DModel(
        **published.transformer | {
            "num_layers": 2, "num_attention_heads": 6, "attention_head_dim": 8, "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 12, "cross_attention_dim": 48, "caption_channels": 24, "sample_size": 8,
            "in_channels": 4, "out_channels": 4,
        }
    )  # fmt: skip
    for p in transformer.parameters():
        torch.nn.init.normal_(p, std=0.15)
    torch.manual_seed(seed)
    for module in (transformer.caption_projection, transformer.caption_norm):
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.15)
    ends = {
        "block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"], "block_out_channels": [8, 8, 16, 16],
        "layers_per_block": [1] * 4, "qkv_multiscales": [[], [], [], [5]],
    }  # fmt: skip
    vae = diffusers.AutoencoderDC(
        **DC_AE | {"latent_channels": 4, "attention_head_dim": 8}
        | {f"{end}_{name}": value for end in ("encoder", "decoder") for name, value in ends.items()}
    )  # fmt: skip
    is_sprint = published.pipeline == "SanaSprintPipeline"
    scheduler = (
        diffusers.SCMScheduler(**TRIG_FLOW) if is_sprint else diffusers.DPMSolverMultistepScheduler(**FLOW)
    )
    pipe = getattr(diffusers, published.pipeline)(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae.eval(),
        transformer=transformer.eval(), scheduler=scheduler,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _instruction() -> list[str]:
    import diffusers

    call = inspect.signature(diffusers.SanaPipeline.__call__).parameters
    lines: list[str] = call["complex_human_instruction"].default
    return lines


def _tokenizer() -> Any:
    """A Gemma tokenizer of characters, a few words and those of the instruction, which begin with a blank."""
    import transformers

    words = "a an the photo image of cat dog teddy bear on in at beach night snow and good close up".split()
    words += re.findall(r"\w+", "".join(_instruction()))
    characters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789,.:;'!?-()\n>▁"
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *characters]
    merges = []
    for word in dict.fromkeys(words):
        for k in range(1, len(word) + 1):
            merges.append((f"▁{word[: k - 1]}", word[k - 1]))
            vocabulary.append(f"▁{word[:k]}")
    unique = dict.fromkeys(vocabulary)
    return transformers.GemmaTokenizer(
        vocab={token: k for k, token in enumerate(unique)},
        merges=list(dict.fromkeys(merges)),
        add_bos_token=True,
    )
