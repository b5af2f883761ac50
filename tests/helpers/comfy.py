"""A stand-in for the parts of ComfyUI's API that the node pack calls, written from its documentation."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import uuid
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikin.models.base import Base
from minikin.models.text import word_vectors_replaced
from minikin.models.unet_names import original_name

PACK = Path(__file__).parents[2] / "comfyui"


def optimized_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **options: Any
) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    mask = mask[:, None] if mask is not None else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class _Any:
    """Any class of the V3 API: it remembers what it was made with."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.args, self.__dict__ = args, options | {"args": args}


def _io() -> SimpleNamespace:
    kinds = ("Combo", "Float", "String", "Model", "Clip", "Conditioning")
    types = {name: SimpleNamespace(Input=_Any, Output=_Any) for name in kinds}
    custom = lambda name: SimpleNamespace(Input=_Any, Output=_Any)  # noqa: E731
    return SimpleNamespace(**types, Schema=_Any, NodeOutput=_Any, ComfyNode=object, Custom=custom)


def load_pack(monkeypatch: Any, folder: Path, *, v3: bool = True) -> Any:
    """The node pack as ComfyUI imports it, over the stand-in; concepts lie in `folder`/minikin."""
    names = ("comfy", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.attention",
             "comfy.patcher_extension", "folder_paths", "comfy_api", "comfy_api.latest")  # fmt: skip
    modules = {name: ModuleType(name) for name in names}
    attention: Any = modules["comfy.ldm.modules.attention"]
    attention.optimized_attention = attention.optimized_attention_masked = optimized_attention
    modules["comfy.patcher_extension"].WrappersMP = SimpleNamespace(CALC_COND_BATCH="calc_cond_batch")  # type: ignore[attr-defined]
    paths: Any = modules["folder_paths"]
    paths.models_dir, paths.folder_names_and_paths = str(folder), {}
    paths.get_filename_list = lambda kind: sorted(p.name for p in (folder / kind).glob("*.safetensors"))
    paths.get_full_path = lambda kind, name: str(p) if (p := folder / kind / name).is_file() else None
    latest: Any = modules["comfy_api.latest"]
    if v3:
        latest.ComfyExtension, latest.io = object, _io()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name.split(".")[0] == "minikin_pack"]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.spec_from_file_location(
        "minikin_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "minikin_pack", pack)
    spec.loader.exec_module(pack)
    return pack


class Clip:
    """A CLIP object over a base: tokens with weights in chunks, `(word:1.2)`, vectors as tokens."""

    def __init__(self, base: Base, names: str) -> None:
        self.base, self.names = base, names  # "l" for SD 1.x, "lg" for SDXL
        for name, model in zip(names, base.text_encoders, strict=True):
            self.cond_stage_model = getattr(self, "cond_stage_model", SimpleNamespace())
            setattr(self.cond_stage_model, f"clip_{name}", SimpleNamespace(transformer=model))

    def tokenize(self, text: str) -> dict[str, list[list[tuple[Any, float]]]]:
        return {n: self._chunks(t, text) for n, t in zip(self.names, self.base.tokenizers, strict=True)}

    def _chunks(self, tokenizer: Any, text: str) -> list[list[tuple[Any, float]]]:
        tokens = []
        for m in re.finditer(r"\(([^():]*):([\d.]+)\)|([^()]+)", text):
            ids = tokenizer(m[1] or m[3], add_special_tokens=False).input_ids
            tokens += [(i, float(m[2] or 1)) for i in ids]
        n = tokenizer.model_max_length - 2
        pieces = [tokens[i : i + n] for i in range(0, len(tokens), n)] or [[]]
        start, end, pad = (
            (i, 1.0) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        )
        return [[start, *piece, end, *[pad] * (n - len(piece))] for piece in pieces]

    @torch.no_grad()
    def encode_from_tokens_scheduled(self, tokens: dict[str, Any]) -> list[list[Any]]:
        parts = []
        for name, model in zip(self.names, self.base.text_encoders, strict=True):
            ids = torch.tensor([[0 if torch.is_tensor(t) else t for t, _ in chunk] for chunk in tokens[name]])
            vectors = [
                (c, (i,), t[None]) for c, chunk in enumerate(tokens[name])
                for i, (t, _) in enumerate(chunk) if torch.is_tensor(t)
            ]  # fmt: skip
            with word_vectors_replaced(model, vectors):
                out = model(ids, output_hidden_states=True)
            states = out.hidden_states[-2] if len(self.names) > 1 else out.last_hidden_state
            parts.append(states.reshape(1, -1, states.shape[-1]))
        return [[torch.cat(parts, -1), {"pooled_output": None}]]


class UNet(nn.Module):
    """The cross-attention layers of a base under their original names; each reads queries of its own."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        layers = base.denoiser.config.layers_per_block
        self.num_res_blocks = [layers]
        self.blocks: list[tuple[Any, Any, Any]] = []
        generator = torch.Generator().manual_seed(0)
        for layer in base.layout.layers:
            attention: Any = base.denoiser.get_submodule(layer.path)
            name = original_name(layer.path, layers)
            module: nn.Module = self
            for part in name.split("."):
                if part not in module._modules:
                    module.add_module(part, attention if part == "attn2" else nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            kind, number, *_ = name.split(".")
            kind = kind.split("_")[0]
            block = kind, 0 if kind == "middle" else int(number), int(name.split(".")[-2])
            x = torch.randn(1, 16, attention.to_q.in_features, generator=generator)
            self.blocks.append((block, attention, x))

    @torch.no_grad()
    def run(self, context: Tensor, options: dict[str, Any]) -> list[Tensor]:
        """The output of each layer before to_out, for a batch of encodings (B, N, D)."""
        out = []
        replaced = options.get("patches_replace", {}).get("attn2", {})
        for block, attention, x in self.blocks:
            x = x.expand(len(context), -1, -1)
            q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
            patch = replaced.get(block, replaced.get(block[:2]))
            its_options = {n: o for n, o in options.items() if n != "patches_replace"} | {
                "n_heads": attention.heads
            }
            done = patch(q, k, v, its_options) if patch else optimized_attention(q, k, v, attention.heads)
            out.append(done)
        return out


class Model:
    """A MODEL: options, patches, wrappers, and what the sampler does in one call."""

    def __init__(self, unet: UNet) -> None:
        self.unet, self.model_options, self.wrappers = unet, {"transformer_options": {}}, {}

    def clone(self) -> Model:
        other = Model(self.unet)
        other.model_options = {"transformer_options": dict(self.model_options["transformer_options"])}
        other.wrappers = {kind: dict(keys) for kind, keys in self.wrappers.items()}
        return other

    def get_model_object(self, name: str) -> Any:
        assert name == "diffusion_model"
        return self.unet

    def set_model_attn2_replace(self, patch: Any, block: str, number: int, index: int | None = None) -> None:
        options = self.model_options["transformer_options"]
        table = dict(options.get("patches_replace", {}).get("attn2", {}))
        table[(block, number) if index is None else (block, number, index)] = patch
        options["patches_replace"] = options.get("patches_replace", {}) | {"attn2": table}

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def sample(self, positive: list[Any], negative: list[Any], sigmas: list[float], rows: int = 1) -> list[Any]:
        """Outputs of all layers in each step: entry by entry, negative first, `rows` images each."""
        conds = [[_entry(e, options) for e, options in of] for of in (negative, positive)]
        for entry in conds[1]:
            if "area" in entry:  # as ComfyUI, which gives the negative prompt the positive one's areas
                conds[0].append({**entry, "model_conds": conds[0][0]["model_conds"]})
        return [self._call(conds, sigma, sigmas, rows) for sigma in sigmas[:-1]]

    def _call(self, conds: list[Any], sigma: float, sigmas: list[float], rows: int) -> Any:
        options = self.model_options | {
            "transformer_options": self.model_options["transformer_options"]
            | {"sample_sigmas": torch.tensor(sigmas)}
        }
        call = self._batch
        for wrapper in (w for of in self.wrappers.get("calc_cond_batch", {}).values() for w in of):
            call = _wrapped(wrapper, call)
        return call(self, conds, torch.zeros(rows, 4, 4, 4), torch.tensor([sigma] * rows), options)

    def _batch(self, model: Any, conds: Any, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> Any:
        entries = [entry for cond in conds for entry in cond]
        context = [entry["model_conds"]["c_crossattn"].cond for entry in entries]
        longest = math.lcm(*(e.shape[1] for e in context))
        e = [e.repeat(len(x), longest // e.shape[1], 1) for e in context]
        transformer = options["transformer_options"] | {
            "uuids": [entry["uuid"] for entry in entries], "sigmas": timestep,
            "original_shape": [len(e) * len(x), *x.shape[1:]],
        }  # fmt: skip
        return self.unet.run(torch.cat(e), transformer)


def _entry(e: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    model_conds = {"c_crossattn": SimpleNamespace(cond=e)}
    return {**options, "cross_attn": e, "model_conds": model_conds, "uuid": uuid.uuid4()}


def _wrapped(wrapper: Any, call: Any) -> Any:
    return lambda *args: wrapper(call, *args)
