"""Records of other tools, as they write them: prompt, negative prompt and settings come back in any script."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minikin.errors import BadPhoto
from minikin.generation.source import SourceImage
from minikin.images import metadata
from minikin.images.metadata import Recorded, parse_parameters
from minikin.images.xmp import PNG_KEY
from minikin.server import decode
from minikin.server.limits import Limits

SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 123, Size: 512x768"
EXPECTED = {"Steps": "20", "Seed": "123", "Size": "512x768", "CFG scale": "7"}


def png(**texts: Any) -> bytes:
    """A PNG with these text chunks: bytes as tools write UTF-8 without saying so, texts as iTXt or tEXt."""
    info, file = PngInfo(), io.BytesIO()
    for key, value in texts.items():
        key = key.replace("__", "-")
        if isinstance(value, bytes):
            info.add(b"tEXt", key.encode() + b"\0" + value)
        else:
            info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    Image.new("RGB", (64, 64), "teal").save(file, "PNG", pnginfo=info)
    return file.getvalue()


def with_exif(kind: str, comment: bytes | str, tag: int = 0x9286, ifd: int = 0x8769, **options: Any) -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    (exif.get_ifd(ifd) if ifd else exif)[tag] = comment
    Image.new("RGB", (64, 64), "teal").save(file, kind, exif=exif.tobytes(), **options)
    return file.getvalue()


def infotext(prompt: str) -> str:
    return f"{prompt}\nNegative prompt: rain\n{SETTINGS}"


def read(data: bytes, tmp_path: Path) -> Recorded:
    """What the command line and the server read, which is the same."""
    path = tmp_path / "image"
    path.write_bytes(data)
    here = metadata.read(path)
    there = metadata.recorded(metadata.texts_of(decode.decode(data, "image", Limits())))
    assert (here.prompt, here.negative, here.settings) == (there.prompt, there.negative, there.settings)
    return here


PROMPTS = [
    "a cat on the beach",
    "猫在海滩上",
    "кот на пляже",
    "قطة على الشاطئ",
    "ビーチの猫, 🐈",
    "une chatte à la plage",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le", "utf-16", "utf-8"])
def test_exif_comments_in_any_script(prompt: str, kind: str, encoding: str, tmp_path: Path) -> None:
    """A1111 and Forge write UTF-16 big-endian, others the rest; read by command line and server alike."""
    record = read(with_exif(kind, b"UNICODE\0" + infotext(prompt).encode(encoding)), tmp_path)
    assert (record.prompt, record.negative) == (prompt, "rain") and record.settings.items() >= EXPECTED.items()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_png_chunks_in_any_script(prompt: str, tmp_path: Path) -> None:
    """iTXt, tEXt in Latin-1, and UTF-8 in tEXt, where the format wants Latin-1."""
    for value in (infotext(prompt), infotext(prompt).encode()):
        record = read(png(parameters=value), tmp_path)
        assert (record.prompt, record.negative) == (
            prompt,
            "rain",
        ) and record.settings.items() >= EXPECTED.items()


@pytest.mark.parametrize(
    "data",
    [
        with_exif("JPEG", b"ASCII\0\0\0" + infotext("a cat").encode()),
        with_exif("JPEG", b"\0" * 8 + infotext("a cat").encode()),
        with_exif("JPEG", infotext("a cat").encode()),
        with_exif("JPEG", infotext("a cat"), ifd=0),  # Fooocus: in the first directory
        with_exif("JPEG", infotext("a cat"), tag=0x010E, ifd=0),  # ImageDescription
        with_exif("JPEG", infotext("a cat").encode("utf-16-le"), tag=0x9C9C, ifd=0),  # XPComment
        with_exif("PNG", b"UNICODE\0" + infotext("a cat").encode("utf-16-be")),
    ],
)
def test_exif_in_other_places(data: bytes, tmp_path: Path) -> None:
    assert read(data, tmp_path).prompt == "a cat"
    comment = io.BytesIO()
    Image.new("RGB", (64, 64)).save(comment, "JPEG", comment=infotext("a cat").encode())
    assert read(comment.getvalue(), tmp_path).negative == "rain"


@pytest.mark.parametrize(
    "text",
    [
        infotext("a cat") + "\nTemplate: a {cat|dog}\nNegative Template: rain",
        infotext("a cat").replace("\n", "\r\n"),
        infotext("a cat").replace("\n", " "),
        infotext("a cat").replace("\n", " ").replace("rain ", "rain, "),
        "\n\n" + infotext("a cat") + "\n\n",
        infotext("a cat").replace("\nSteps", " Steps"),
        "a cat\nNegative prompt: rain\nSteps: 20, Seed: 123, CFG scale: 7, Size: 512x768, Sampler: Euler a, "
        'Civitai resources: [{"type":"checkpoint","modelVersionId":1,"modelName":"a"}], Civitai metadata: {}',
        infotext("a cat") + ', Lora hashes: "x: 123, y: 456", Version: f2.0.1v1.10.1, Module 1: ae',
        infotext("a cat") + ', Model: "\\ud800"',
    ],
)
def test_settings_wherever_they_stand(text: str) -> None:
    """With lines of extensions behind them, in one line, with other line breaks, with what Civitai adds."""
    prompt, negative, settings = parse_parameters(text)
    assert (prompt, negative) == ("a cat", "rain") and settings.items() >= EXPECTED.items()
    assert "".join(settings.values()).encode()  # texts that can be written and sent


# ---- other tools ---------------------------------------------------------------------------------


def sampler(**more: Any) -> dict[str, Any]:
    return {"class_type": "KSampler", "inputs": {
        "seed": 123, "steps": 20, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0,
        "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0], **more,
    }}  # fmt: skip


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


PLAIN = {
    "3": sampler(), "4": node("CheckpointLoaderSimple", ckpt_name="dream.safetensors"),
    "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
    "6": node("CLIPTextEncode", text="a cat", clip=["4", 1]),
    "7": node("CLIPTextEncode", text="rain", clip=["4", 1]),
    "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]), "9": node("SaveImage", images=["8", 0]),
}  # fmt: skip
SECOND_PASS = {
    **PLAIN, "8": node("VAEDecode", samples=["11", 0], vae=["4", 2]), "10": node("LatentUpscale",
    samples=["3", 0]),
    "11": sampler(seed=9, steps=12, denoise=0.5, latent_image=["10", 0]),
}  # fmt: skip
CONTROLNET = {
    **PLAIN, "3": sampler(positive=["12", 0], negative=["12", 1]),
    "12": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], strength=1.0),
}  # fmt: skip
PRIMITIVES = {
    **PLAIN, "3": sampler(seed=["20", 0]), "20": node("PrimitiveInt", value=123),
    "6": node("CLIPTextEncode", text=["21", 0]), "21": node("StringConcatenate", string_a="a", string_b=["22",
    0]),
    "22": node("PrimitiveStringMultiline", value="cat"),
}  # fmt: skip
CUSTOM = {
    **{k: PLAIN[k] for k in "45679"}, "8": node("VAEDecode", samples=["13", 0]),
    "13": node("SamplerCustomAdvanced", noise=["14", 0], guider=["15", 0], sampler=["16", 0], sigmas=["17", 0],
               latent_image=["5", 0]),
    "14": node("RandomNoise", noise_seed=123), "16": node("KSamplerSelect", sampler_name="dpmpp_2m"),
    "15": node("CFGGuider", cfg=7, positive=["18", 0], negative=["7", 0]),
    "17": node("BasicScheduler", scheduler="karras", steps=20, denoise=1.0),
    "18": node("FluxGuidance", conditioning=["6", 0], guidance=3.5),
}  # fmt: skip
EFFICIENT = {
    "1": node("Efficient Loader", positive="a cat", negative="rain", empty_latent_width=512,
    empty_latent_height=768,
              ckpt_name="dream.safetensors"),
    "2": node("KSampler (Efficient)", seed=123, steps=20, cfg=7.0, sampler_name="dpmpp_2m", scheduler="karras",
              positive=["1", 1], negative=["1", 2], latent_image=["1", 3]),
    "3": node("SaveImage", images=["2", 5]),
}  # fmt: skip
SDXL = {**PLAIN, "6": node("CLIPTextEncodeSDXL", text_g="a cat", text_l="a cat", width=1024, height=1024)}
WORKFLOW = {
    "last_node_id": 9, "version": 0.4, "nodes": [
        {"id": 3, "type": "KSampler", "widgets_values": [123, "randomize", 20, 7, "dpmpp_2m", "karras", 1],
        "mode": 0,
         "inputs": [{"name": "model", "link": 1}, {"name": "positive", "link": 4}, {"name": "negative",
         "link": 6},
                    {"name": "latent_image", "link": 2}]},
        {"id": 4, "type": "CheckpointLoaderSimple", "widgets_values": ["dream.safetensors"]},
        {"id": 5, "type": "EmptyLatentImage", "widgets_values": [512, 768, 1]},
        {"id": 6, "type": "CLIPTextEncode", "widgets_values": ["a cat"], "inputs": [{"name": "clip",
        "link": 3}]},
        {"id": 7, "type": "CLIPTextEncode", "widgets_values": ["rain"], "inputs": [{"name": "clip",
        "link": 5}]},
        {"id": 8, "type": "VAEDecode", "inputs": [{"name": "samples", "link": 7}]},
        {"id": 9, "type": "SaveImage", "widgets_values": ["out"], "inputs": [{"name": "images", "link": 9}]},
    ],
    "links": [[1, 4, 0, 3, 0, "MODEL"], [2, 5, 0, 3, 3, "LATENT"], [3, 4, 1, 6, 0, "CLIP"],
              [4, 6, 0, 3, 1, "CONDITIONING"], [5, 4, 1, 7, 0, "CLIP"], [6, 7, 0, 3, 2, "CONDITIONING"],
              [7, 3, 0, 8, 0, "LATENT"], [9, 8, 0, 9, 0, "IMAGE"]],
}  # fmt: skip
SWARM = {"sui_image_params": {
    "prompt": "a cat", "negativeprompt": "rain", "model": "OfficialStableDiffusion/sd_xl_base_1.0", "seed": 123,
    "steps": 20, "cfgscale": 7.0, "aspectratio": "Custom", "width": 512, "height": 768, "sampler": "dpmpp_2m",
    "scheduler": "karras", "swarm_version": "0.9.6.2"}, "sui_extra_data": {"date": "2026-01-01"}}  # fmt: skip
FOOOCUS = {
    "base_model": "juggernautXL", "full_prompt": ["cinematic a cat"], "guidance_scale": 7.0,
    "metadata_scheme": "fooocus",
    "negative_prompt": "rain", "prompt": "a cat", "resolution": "(512, 768)", "sampler": "dpmpp_2m",
    "seed": "123",
    "scheduler": "karras", "steps": 20, "styles": "['Fooocus V2']", "version": "Fooocus v2.5.5",
}  # fmt: skip
RUINED = {
    "Prompt": "a cat", "Negative": "rain", "steps": 20, "cfg": 7, "width": 512, "height": 768, "seed": 123,
    "sampler_name": "dpmpp_2m", "scheduler": "karras", "software": "RuinedFooocus",
}  # fmt: skip
INVOKE = {
    "generation_mode": "sdxl_txt2img", "positive_prompt": "a cat", "negative_prompt": "rain", "width": 512,
    "height": 768,
    "seed": 123, "cfg_scale": 7.0, "steps": 20, "scheduler": "dpmpp_2m_k", "model": {"key": "x",
    "name": "dream"},
    "app_version": "5.4.2",
}  # fmt: skip
INVOKE_2 = {
    "model": "stable diffusion", "app_id": "invoke-ai/InvokeAI", "app_version": "2.3.5", "image": {
        "prompt": [{"prompt": "a cat [rain]", "weight": 1.0}], "steps": 20, "cfg_scale": 7.0, "seed": 123,
        "width": 512, "height": 768, "sampler": "k_dpmpp_2", "type": "txt2img"},
}  # fmt: skip
NOVELAI = {
    "prompt": "a cat", "uc": "rain", "steps": 20, "scale": 7.0, "seed": 123, "sampler": "k_euler", "width": 512,
    "height": 768, "noise_schedule": "karras",
}  # fmt: skip
DRAW_THINGS = {"c": "a cat", "uc": "rain", "seed": 123, "steps": 20, "scale": 7, "sampler": "DPM++ 2M Karras",
               "size": "512x768", "model": "sd_v1.5"}  # fmt: skip
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description xmlns:exif="http://ns.adobe.com/exif/1.0/">'
    '<exif:UserComment><rdf:Alt><rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></exif:UserComment>'
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
)
NAN = json.dumps(PLAIN)[:-1] + ', "30": {"class_type": "X", "inputs": {}, "is_changed": [NaN]}}'
TOOLS: dict[str, bytes] = {
    "comfyui": png(prompt=PLAIN, workflow=WORKFLOW),
    "comfyui workflow alone": png(workflow=WORKFLOW),
    "comfyui, a second pass": png(prompt=SECOND_PASS),
    "comfyui, a controlnet": png(prompt=CONTROLNET),
    "comfyui, custom sampling": png(prompt=CUSTOM),
    "comfyui, efficiency nodes": png(prompt=EFFICIENT),
    "comfyui, sdxl": png(prompt=SDXL),
    "comfyui, NaN": png(prompt=NAN),
    "comfyui in webp": with_exif("WEBP", "prompt:" + json.dumps(PLAIN), tag=0x0110, ifd=0),
    "comfyui in webp, both": with_exif("WEBP", "Prompt: " + json.dumps(PLAIN), tag=0x010F, ifd=0),
    "swarmui": png(parameters=SWARM),
    "swarmui in jpeg": with_exif("JPEG", b"UNICODE\0" + json.dumps(SWARM).encode("utf-16-le")),
    "fooocus": png(parameters=FOOOCUS, fooocus_scheme="fooocus"),
    "fooocus in jpeg": with_exif("JPEG", json.dumps(FOOOCUS), ifd=0),
    "ruined fooocus": png(parameters=RUINED),
    "invokeai": png(invokeai_metadata=INVOKE, invokeai_graph="{}"),
    "invokeai 2": png(**{"sd-metadata": INVOKE_2,
    "Dream": '"a cat [rain]" -s 20 -S 123 -W 512 -H 768 -C 7.0 -A k_dpmpp_2'}),
    "invokeai 1": png(Dream='"a cat [rain]" -s 20 -S 123 -W 512 -H 768 -C 7.0 -A k_dpmpp_2'),
    "a seed as a float": png(parameters=RUINED | {"seed": 123.0}),
    "novelai": png(Software="NovelAI", Description="a cat", Comment=NOVELAI),
    "draw things": png(**{PNG_KEY: XMP.format(json.dumps(DRAW_THINGS).replace('"', "&quot;"))}),
    "easy diffusion": png(prompt="a cat", negative_prompt="rain", seed="123", num_inference_steps="20",
                          guidance_scale="7", width="512", height="768", sampler_name="dpmpp_2m"),
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_records_of_other_tools(tool: str, tmp_path: Path) -> None:
    record = read(TOOLS[tool], tmp_path)
    assert (record.prompt, record.negative) == ("a cat", "rain")
    assert record.settings.items() >= EXPECTED.items()
    assert record.settings["Sampler"] and record.recipe == {}
    source = SourceImage.of(tmp_path / "image").settings
    assert {k: source[k] for k in ("prompt", "negative", "seed")} == {
        "prompt": "a cat",
        "negative": "rain",
        "seed": 123,
    }


def test_texts_from_other_nodes(tmp_path: Path) -> None:
    record = read(png(prompt=PRIMITIVES), tmp_path)
    assert record.prompt == "a, cat" and record.settings["Seed"] == "123"
    for seed in (4294967295.0, 1e300, 2**70):  # none is shortened
        record = read(png(prompt={**PLAIN, "3": sampler(seed=seed)}), tmp_path)
        assert record.settings["Seed"] == str(int(seed))


NOT_UNDERSTOOD = {
    "json": png(parameters={"note": "hello", "items": [1, 2]}), "list": png(parameters="[1, 2]"),
    "broken json": png(parameters='{"prompt": "a cat"'), "a graph without texts": png(prompt={"1": sampler()}),
    "a graph of no images": png(prompt={"1": node("LoadAudio", file="x")}), "deep": png(prompt="[" * 50_000),
    "a camera": with_exif("JPEG", b"ASCII\0\0\0Shot on a phone"), "screenshot": with_exif("JPEG",
    b"ASCII\0\0\0Screenshot"),
    "camera json": with_exif("JPEG", b"ASCII\0\0\0" + b'{"aiEnhanced":"0","mode":"auto"}'),
    "half a pair": png(parameters='{"prompt": "a \\ud800 cat", "steps": 3}'),
    "comment": png(Comment="Created with GIMP"),
    "maker": with_exif("JPEG", "NIKON", tag=0x010F, ifd=0), "binary": with_exif("JPEG", bytes(range(256))),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_never_a_prompt(name: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(NOT_UNDERSTOOD[name])
    with pytest.raises(BadPhoto, match="carries no recipe"):
        metadata.read(path)
    source = SourceImage.of(path)
    assert source.settings.get("prompt", "") == "" and source.record == {}


@pytest.mark.parametrize(
    "text", ["[" * 99_000, '{"a":' * 15_000, '{"recipe": {"prompt": "\\udfff"}}', "[1]", "{}}", '{"a":1,"a":2}']
)
def test_a_record_that_is_damaged_is_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadPhoto, match="carries no recipe"):
        read(png(minikin=text), tmp_path)
    assert read(png(minikin=text, parameters=infotext("a cat")), tmp_path).prompt == "a cat"
