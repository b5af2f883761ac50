"""Adapter files of other trainers: every kind as its own tool applies it, every name, foreign tensors apart."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minikin import Studio
from minikin.errors import BadConceptFile, UnknownName
from minikin.models.base import Base
from minikin.models.lora import adapters, lora_file, lora_keys
from minikin.models.lora.adapters import Adapters
from minikin.models.lora.lora_keys import components
from minikin.perfusion.export import read_embedding
from tests.helpers import ldm
from tests.helpers.loras import ATTENTION, Pairs, product, random_lora, write

UNET = {  # layers of each shape in a U-Net: linear, convolution of 3x3, of 1x1, norms of both kinds
    "linear": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "3x3": "down_blocks.0.resnets.0.conv1",
    "1x1": "down_blocks.0.attentions.0.proj_in",
    "group norm": "down_blocks.0.resnets.0.norm1",
    "layer norm": "down_blocks.0.attentions.0.transformer_blocks.0.norm1",
}
TEXT = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)


def layer(base: Base, path: str, component: str = "unet") -> Any:
    model = components(base)[component]
    return model.get_submodule(f"text_model.{path}" if hasattr(model, "text_model") else path)


def merged(base: Base, path: Path, name: str, weight: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a U-Net's layer with this adapter applied; the layer is as before afterwards."""
    manager, module = Adapters(base), layer(base, name)
    before = module.weight.clone(), type(module)
    with manager.using([(manager.get(path), weight)]):
        result = module.lora_weight.clone(), None if module.lora_bias is None else module.lora_bias.clone()
    assert torch.equal(module.weight, before[0]) and type(module) is before[1]
    return result


# ---- LyCORIS ----------------------------------------------------------------------------------------


def lycoris(algo: str, module: nn.Module, **options: Any) -> Any:
    """A module of LyCORIS with random tensors, the ones it would start at zero too."""
    from lycoris import modules

    cls = {"lora": modules.LoConModule, "loha": modules.LohaModule, "lokr": modules.LokrModule,
           "full": modules.FullModule, "norm": modules.NormModule, "ia3": modules.IA3Module}[algo]  # fmt: skip
    lycoris_module = cls("lora_unet_x", module, multiplier=1.0, **options)
    g = torch.Generator().manual_seed(3)
    for name, p in lycoris_module.named_parameters():
        if "dora_scale" in name:
            p.data.mul_(1 + 0.2 * torch.rand(p.shape, generator=g))
        else:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=g))
    return lycoris_module.eval()


def changed(theirs: Any, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with which LyCORIS's module computes.

    Not `get_merged_weight` of LoHa and LoKr, which multiplies by alpha / rank twice in 4.1; `forward` does not.
    """
    if not hasattr(theirs, "get_weight"):
        return theirs.get_merged_weight(multiplier=1.0)
    weight = module.weight + theirs.get_weight(module.weight.shape) * theirs.scalar
    return theirs.apply_weight_decompose(weight) if theirs.wd else weight, None


def stored(theirs: Any, path: str) -> dict[str, Tensor]:
    """The tensors that LyCORIS writes for a layer of the U-Net."""
    state = theirs.state_dict() if theirs.name in ("ia3", "norm") else theirs.custom_state_dict()
    names = {f"lora_unet_{path.replace('.', '_')}.{k}": v for k, v in state.items()}
    return {k: v.detach().clone().contiguous() for k, v in names.items() if not k.endswith("org_weight")}


KINDS = {
    "LoRA": ("lora", "linear", {"lora_dim": 3, "alpha": 2}),
    "LoCon": ("lora", "3x3", {"lora_dim": 3, "alpha": 2}),
    "LoCon, Tucker": ("lora", "3x3", {"lora_dim": 3, "alpha": 2, "use_tucker": True}),
    "LoCon of 1x1": ("lora", "1x1", {"lora_dim": 3, "alpha": 2}),
    "rsLoRA": ("lora", "linear", {"lora_dim": 4, "alpha": 2, "rs_lora": True}),
    "DoRA": ("lora", "linear", {"lora_dim": 3, "alpha": 2, "weight_decompose": True}),
    "DoRA by columns": ("lora", "linear", {"lora_dim": 3, "weight_decompose": True, "wd_on_out": False}),
    "DoRA of a convolution": ("lora", "3x3", {"lora_dim": 3, "alpha": 2, "weight_decompose": True}),
    "DoRA of a convolution by columns": (
        "lora", "3x3", {"lora_dim": 3, "weight_decompose": True, "wd_on_out": False}
    ),
    "DoRA, Tucker": ("lora", "3x3", {"lora_dim": 3, "use_tucker": True, "weight_decompose": True}),
    "LoHa": ("loha", "linear", {"lora_dim": 3, "alpha": 2}),
    "LoHa of a convolution": ("loha", "3x3", {"lora_dim": 3, "alpha": 2}),
    "LoHa, Tucker": ("loha", "3x3", {"lora_dim": 3, "alpha": 2, "use_tucker": True}),
    "LoHa with DoRA": ("loha", "linear", {"lora_dim": 3, "alpha": 2, "weight_decompose": True}),
    "LoKr": ("lokr", "linear", {"lora_dim": 2, "alpha": 1}),
    "LoKr of whole matrices": ("lokr", "linear", {"lora_dim": 10_000, "alpha": 1}),
    "LoKr of two pairs": ("lokr", "linear", {"lora_dim": 1, "alpha": 2, "decompose_both": True}),
    "LoKr, factor 4": ("lokr", "linear", {"lora_dim": 2, "alpha": 1, "factor": 4}),
    "LoKr of a convolution": ("lokr", "3x3", {"lora_dim": 2, "alpha": 1}),
    "LoKr, Tucker": ("lokr", "3x3", {"lora_dim": 2, "alpha": 1, "use_tucker": True}),
    "LoKr of a whole convolution": ("lokr", "3x3", {"lora_dim": 2, "full_matrix": True}),
    "LoKr with DoRA": ("lokr", "linear", {"lora_dim": 2, "alpha": 1, "weight_decompose": True}),
    "group norm": ("norm", "group norm", {}),
    "layer norm": ("norm", "layer norm", {}),
    "IA3": ("ia3", "linear", {}),
    "IA3 of inputs": ("ia3", "linear", {"train_on_input": True}),
    "IA3 of a convolution": ("ia3", "3x3", {"train_on_input": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_lycoris_are_merged_as_lycoris_merges_them(
    bases: dict[str, Base], tmp_path: Path, kind: str
) -> None:
    """A file with LyCORIS's own tensors: the merged weights, and the bias of norms, are its own to 1e-6."""
    algo, shape, options = KINDS[kind]
    base = bases["sd15"]
    module = layer(base, UNET[shape])
    with torch.no_grad():
        theirs = lycoris(algo, module, **options)
        weight, bias = changed(theirs, module)
        save_file(stored(theirs, UNET[shape]), tmp_path / "x.safetensors")
    ours, our_bias = merged(base, tmp_path / "x.safetensors", UNET[shape])
    assert (ours - weight).abs().max() <= 1e-6 * max(1.0, float(weight.abs().max()))
    assert (ours - module.weight).abs().max() > 1e-3
    if bias is not None:
        assert our_bias is not None and torch.allclose(our_bias, bias, atol=1e-6)


@pytest.mark.parametrize("shape", ["linear", "3x3", "1x1"])
def test_whole_differences_of_weights_and_biases(bases: dict[str, Base], tmp_path: Path, shape: str) -> None:
    """`diff` and `diff_b`, alone and beside a LoRA: the weights of a full fine-tune."""
    base = bases["sd15"]
    module = layer(base, UNET[shape])
    stem = "lora_unet_" + UNET[shape].replace(".", "_")
    diff = 0.1 * torch.randn(module.weight.shape)
    tensors = {f"{stem}.diff": diff}
    if module.bias is not None:
        tensors[f"{stem}.diff_b"] = 0.1 * torch.randn(module.bias.shape)
    save_file(tensors, tmp_path / "x.safetensors")
    weight, bias = merged(base, tmp_path / "x.safetensors", UNET[shape], 0.5)
    assert torch.allclose(weight, module.weight + 0.5 * diff, atol=1e-6)
    if module.bias is not None:
        assert bias is not None and torch.allclose(
            bias, module.bias + 0.5 * tensors[f"{stem}.diff_b"], atol=1e-6
        )


def test_a_bias_beside_a_lora(bases: dict[str, Base], tmp_path: Path) -> None:
    base, module = bases["sd15"], layer(bases["sd15"], UNET["3x3"])
    pair = next(p for k, p in random_lora(base, layers=("conv1",)).items() if k[1] == UNET["3x3"])
    path = write(tmp_path / "x.safetensors", {("unet", UNET["3x3"]): pair}, "kohya")
    stem = "lora_unet_" + UNET["3x3"].replace(".", "_")
    shift = 0.1 * torch.randn(module.bias.shape)
    save_file(load_file(path) | {f"{stem}.diff_b": shift}, path)
    weight, bias = merged(base, path, UNET["3x3"])
    assert bias is not None and torch.allclose(bias, module.bias + shift, atol=1e-6)
    assert torch.allclose(weight, module.weight + product(*pair), atol=1e-6)


def test_weights_of_dora_scale_its_difference_and_sums_add_up(bases: dict[str, Base], tmp_path: Path) -> None:
    """As A1111 and ComfyUI: W + w (W' - W); two adapters add their differences, in any order."""
    base, module = bases["sd15"], layer(bases["sd15"], UNET["linear"])
    paths, differences = [], []
    for k, algo in enumerate(("lora", "lokr")):
        with torch.no_grad():
            theirs = lycoris(algo, module, lora_dim=2, alpha=1, weight_decompose=algo == "lora")
            differences.append(changed(theirs, module)[0] - module.weight)
            paths.append(tmp_path / f"{k}.safetensors")
            save_file(stored(theirs, UNET["linear"]), paths[-1])
    weight, _ = merged(base, paths[0], UNET["linear"], 0.6)
    assert torch.allclose(weight, module.weight + 0.6 * differences[0], atol=1e-6)
    manager = Adapters(base)
    with manager.using([(manager.get(paths[1]), 0.5), (manager.get(paths[0]), 1.0)]):
        assert torch.allclose(
            module.lora_weight, module.weight + differences[0] + 0.5 * differences[1], atol=1e-6
        )


# ---- PEFT -------------------------------------------------------------------------------------------


def peft_layer(kind: str, module: nn.Module) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The module inside a model of PEFT's with random tensors: the model, its tensors, its configuration."""
    import copy

    import peft

    shared = {"r": 3, "target_modules": ["x"]}
    configs = {
        "LoRA": lambda: peft.LoraConfig(lora_alpha=2, **shared),
        "rsLoRA": lambda: peft.LoraConfig(lora_alpha=2, use_rslora=True, **shared),
        "DoRA": lambda: peft.LoraConfig(lora_alpha=2, use_dora=True, **shared),
        "LoHa": lambda: peft.LoHaConfig(alpha=2, use_effective_conv2d=True, **shared),
        "LoHa, flat": lambda: peft.LoHaConfig(alpha=2, **shared),
        "LoKr": lambda: peft.LoKrConfig(alpha=2, use_effective_conv2d=True, **shared),
        "LoKr, flat": lambda: peft.LoKrConfig(alpha=2, decompose_both=True, **shared),
    }  # fmt: skip
    config = configs[kind]()
    model = peft.get_peft_model(nn.ModuleDict({"x": copy.deepcopy(module)}), config)
    g = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data.mul_(1 + 0.2 * torch.rand(p.shape, generator=g))
        elif "base_layer" not in name:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=g))
    tensors = peft.get_peft_model_state_dict(model)
    return model, {k: v.detach().clone().contiguous() for k, v in tensors.items()}, config.to_dict()


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("shape", ["linear", "3x3"])
@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "DoRA", "LoHa", "LoHa, flat", "LoKr", "LoKr, flat"])
def test_kinds_of_peft_are_merged_as_peft_merges_them(
    bases: dict[str, Base], tmp_path: Path, kind: str, shape: str, link: bool
) -> None:
    """PEFT's own folder, also by the name that `models add` links it under: its merged weights, to 1e-6."""
    base = bases["sd15"]
    module = layer(base, UNET[shape])
    model, tensors, config = peft_layer(kind, module)
    folder = tmp_path / "peft"
    folder.mkdir()
    renamed = {k.replace("model.x.", f"model.{UNET[shape]}."): v for k, v in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    plain = {k: v for k, v in config.items() if isinstance(v, int | float | str | dict | type(None))}
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    path = folder / "adapter_model.safetensors"
    ours, _ = merged(base, adapters.add(path, "style") if link else path, UNET[shape])
    model.merge_adapter()
    theirs = model.base_model.model["x"].get_base_layer().weight
    assert (ours - theirs).abs().max() <= 1e-6 * max(1.0, float(theirs.abs().max()))
    assert (ours - module.weight).abs().max() > 1e-3


def test_a_peft_file_without_its_configuration_says_so(bases: dict[str, Base], tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", random_lora(bases["sd15"], layers=("conv1",)), "peft-own")
    (path.parent / "adapter_config.json").unlink()
    (note,) = lora_file.load(bases["sd15"], path, "x").notes
    assert "alpha = rank is used" in note


def test_dora_of_diffusers(bases: dict[str, Base], tmp_path: Path) -> None:
    """diffusers writes PEFT's tensors under `unet.`, its settings into the metadata."""
    base, module = bases["sd15"], layer(bases["sd15"], UNET["linear"])
    model, tensors, _ = peft_layer("DoRA", module)
    renamed = {k.replace("base_model.model.x", f"unet.{UNET['linear']}"): v for k, v in tensors.items()}
    facts = {"unet.r": 3, "unet.lora_alpha": 2, "unet.use_dora": True}
    save_file(renamed, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(facts)})
    ours, _ = merged(base, tmp_path / "x.safetensors", UNET["linear"])
    model.merge_adapter()
    theirs = model.base_model.model["x"].get_base_layer().weight
    assert torch.allclose(ours, theirs, atol=1e-6)


# ---- names of layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_original_names_are_those_of_checkpoints(bases: dict[str, Base], family: str) -> None:
    """Every layer's sgm name is the one in a single-file checkpoint of the same model."""
    base = bases[family]
    prefix = "model.diffusion_model."
    in_checkpoint = {
        k.removeprefix(prefix).rpartition(".")[0] for k in ldm.checkpoint(base.pipe, family) if prefix in k
    }
    ours = {
        lora_keys.original_name(path, base.denoiser)
        for path, module in base.denoiser.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }  # fmt: skip
    assert ours == in_checkpoint


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "lycoris_"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_sgm_names_of_every_family(bases: dict[str, Base], tmp_path: Path, family: str, prefix: str) -> None:
    """OneTrainer, kohya's SDXL scripts and ComfyUI number blocks as the original code does."""
    base = bases[family]
    pairs = {
        k: p for k, p in random_lora(base, layers=(*ATTENTION, "conv1", "linear_1")).items() if k[0] == "unet"
    }
    assert family != "sdxl" or ("unet", "add_embedding.linear_1") in pairs
    tensors = {}
    for (_, path), (down, up) in pairs.items():
        name = lora_keys.original_name(path, base.denoiser)
        stem = prefix + (name if prefix.endswith(".") else name.replace(".", "_"))
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(tensors, tmp_path / "x.safetensors")
    read = lora_file.load(base, tmp_path / "x.safetensors", "x")
    assert set(read.layers) == set(pairs)
    assert all(torch.allclose(product(*read.pairs[k]), product(*p), atol=1e-6) for k, p in pairs.items())


def test_onetrainers_file_for_sdxl(bases: dict[str, Base], tmp_path: Path) -> None:
    """`add_embedding`, `time_embedding`, `conv_in` and both text encoders, with alpha, by diffusers' names."""
    base = bases["sdxl"]
    paths = (
        "add_embedding.linear_1",
        "add_embedding.linear_2",
        "time_embedding.linear_1",
        "conv_in",
        "conv_out",
    )
    tensors: dict[str, Tensor] = {}
    expected: Pairs = {}
    for k, path in enumerate((*paths, TEXT, TEXT)):
        part = "unet" if k < len(paths) else ("text_encoder", "text_encoder_2")[k - len(paths)]
        module = layer(base, path, part) if part != "unet" else base.denoiser.get_submodule(path)
        head = {
            "unet": "lora_unet_",
            "text_encoder": "lora_te1_text_model_",
            "text_encoder_2": "lora_te2_text_model_",
        }
        stem = head[part] + path.replace(".", "_")
        out, *rest = module.weight.shape
        down, up = torch.randn(2, *rest), torch.randn(out, 2, *[1] * (len(rest) - 1))
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(1.0),
        }
        expected[part, path] = down, up
    save_file(tensors, tmp_path / "x.safetensors")
    read = lora_file.load(base, tmp_path / "x.safetensors", "x")
    actual = {(part, path.removeprefix("text_model.")): pair for (part, path), pair in read.pairs.items()}
    assert actual.keys() == expected.keys()
    assert all(torch.allclose(product(*actual[k]), 0.5 * product(*p), atol=1e-6) for k, p in expected.items())


# ---- foreign tensors --------------------------------------------------------------------------------


def with_embeddings(base: Base, path: Path, *names: str) -> Path:
    """A LoRA of OneTrainer's with embeddings in it; the path."""
    write(path, random_lora(base, layers=("to_v",)), "kohya", alpha=1)
    tensors = load_file(path)
    for name in names:
        parts = ("clip_l", "clip_g") if base.is_xl else ("emb_params",)
        for part, model in zip(parts, base.text_encoders, strict=True):
            width = model.get_input_embeddings().embedding_dim
            tensors[f"bundle_emb.{name}.{part}"] = torch.randn(2, width)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_bundled_embeddings_are_set_aside_and_offered(
    bases: dict[str, Base], tmp_path: Path, family: str
) -> None:
    """The LoRA is used, the note names the embedding and its command, and the command's reader finds it."""
    base = bases[family]
    path = with_embeddings(base, tmp_path / "ink.safetensors", "my.token")
    read = lora_file.load(base, path, "ink")
    (note,) = read.notes
    assert "the embedding 'my.token', which is not used" in note and "minikin concepts import FILE" in note
    assert set(read.layers) == set(random_lora(base, layers=("to_v",)))
    notes: list[str] = []
    for event in Studio(base).painting(_paint(base, "a cat <lora:ink:0.8>")):
        notes += [event.text] if getattr(event, "warning", False) else []
    assert note in notes
    vectors = read_embedding(path, len(base.text_encoders))
    assert [len(v) for v in vectors] == [2] * len(base.text_encoders)


def _paint(base: Base, prompt: str) -> Any:
    from minikin.recipes import Paint

    return Paint.make(prompt=prompt, base=base.name, steps=1, width=64, height=64)


def test_one_of_several_bundled_embeddings_is_chosen_by_name(bases: dict[str, Base], tmp_path: Path) -> None:
    path = with_embeddings(bases["sd15"], tmp_path / "ink.safetensors", "tom", "Rex")
    expected = load_file(path)["bundle_emb.Rex.emb_params"]
    assert torch.equal(read_embedding(path, 1, "rex")[0], expected)
    with pytest.raises(BadConceptFile, match="2 embeddings, Rex and tom. Give the one you want as --name"):
        read_embedding(path, 1, "other")


def test_other_foreign_tensors_are_named(bases: dict[str, Base], tmp_path: Path) -> None:
    base = bases["sd15"]
    path = write(tmp_path / "x.safetensors", random_lora(base, layers=("to_v",)), "kohya")
    foreign = {"denoiser.sigmas": torch.ones(3), "clip_l": torch.full((2, 2), torch.nan)}
    save_file(load_file(path) | foreign, path)
    (note,) = lora_file.load(base, path, "x").notes
    assert "2 tensors that are not used" in note and "denoiser.sigmas" in note and "clip_l" in note


# ---- names of files ---------------------------------------------------------------------------------

NAMES = (
    "it's me", "[anime] ink", "salt & pepper", "ink, v2", "(XL) ink", "50%", "plain", "ink.v1.2", ".hidden",
    "墨絵", "Ёжик", "  two  blanks ", "a" * 200, "ink=best!", "{x}", "#1", "~tilde", "emoji 🎨",
)  # fmt: skip


@pytest.mark.parametrize("place", ["", "loras", "loras/styles/old", "models"])
def test_files_are_found_by_whatever_name_they_have(tmp_path: Path, place: str) -> None:
    folder = adapters.folder() / "below" if place == "models" else tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / f"{name}.safetensors").write_bytes(b"")
        assert adapters.find(name).samefile(folder / f"{name}.safetensors")
        assert adapters.find(f"{name}.safetensors").samefile(folder / f"{name}.safetensors")
    (folder / "UPPER.SAFETENSORS").write_bytes(b"")
    assert adapters.find("UPPER").name == "UPPER.SAFETENSORS"
    (folder / f"{unicodedata.normalize('NFD', 'café')}.safetensors").write_bytes(b"")
    assert adapters.find(unicodedata.normalize("NFC", "café")).parent.samefile(folder)
    with pytest.raises(UnknownName):
        adapters.find("not there")


def test_folders_below_are_part_of_a_name(tmp_path: Path) -> None:
    """`styles/ink` and `styles\\ink`, as ComfyUI names files; the nearest of equal names is found without."""
    for folder in ("loras/styles", "loras/things"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "ink.safetensors").write_bytes(b"")
    assert adapters.find("things/ink") == adapters.find("things\\ink") == Path("loras/things/ink.safetensors")
    assert adapters.find("ink") == Path("loras/styles/ink.safetensors")
    (tmp_path / "loras" / "ink.safetensors").write_bytes(b"")
    assert adapters.find("ink") == Path("loras/ink.safetensors")
