"""JSON records of other image generators as prompt, negative prompt and settings under A1111's names.

Read are SwarmUI, Fooocus (and its kin), InvokeAI 1 to 5, NovelAI, Draw Things and Easy Diffusion; ComfyUI's
graphs are read by `images/comfyui.py`. JSON of any other kind gives None: it is never taken for a prompt.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from minikin import strict_json
from minikin.images import comfyui
from minikin.images.comfyui import ToolRecord
from minikin.images.texts import MAX_CHARACTERS, PARAMETERS

# the names that tools give to one setting, in lower case without blanks and signs
_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "positiveprompt", "positive", "c", "rawprompt"),
    "negative": ("negativeprompt", "negative", "uc", "negprompt", "rawnegativeprompt"),
    "Steps": ("steps", "numinferencesteps"),
    "Sampler": ("sampler", "samplername", "scheduler"),
    "Schedule type": ("scheduletype", "noiseschedule"),
    "CFG scale": ("cfgscale", "cfg", "guidancescale", "scale"),
    "Seed": ("seed",),
    "Model": ("model", "basemodel", "usestablediffusionmodel"),
    "Clip skip": ("clipskip",),
    "Denoising strength": ("denoisingstrength", "strength", "overwriteswitch"),
}
_SIZES = (("width", "height"), ("w", "h"))
_DREAM = {"s": "Steps", "S": "Seed", "C": "CFG scale", "A": "Sampler", "W": "width", "H": "height"}


def read(texts: Mapping[str, str]) -> ToolRecord | None:
    """What another tool recorded in these texts of an image; None for nothing, or nothing understood."""
    parameters = texts.get(PARAMETERS, "")
    if parameters.lstrip().startswith("{"):
        return _of_object(_json(parameters))
    for key in ("invokeai_metadata", "sd-metadata"):
        if key in texts:
            return _of_object(_json(texts[key]))
    if "Dream" in texts:
        return _dream(texts["Dream"])
    if texts.get("Software", "").startswith("NovelAI") and "Comment" in texts:
        return _of_object(_json(texts["Comment"]))
    if "num_inference_steps" in texts and "prompt" in texts:  # Easy Diffusion
        return _flat(dict(texts))
    for key in ("prompt", "workflow"):
        if (graph := _json(texts.get(key, ""))) and (record := comfyui.read(graph)):
            return record
    return None


def _json(text: str) -> dict[str, Any]:
    """The object in a text; {} for none. ComfyUI writes NaN."""
    try:
        return strict_json.loads(text, kind=dict, max_bytes=MAX_CHARACTERS, max_values=50_000, nan_as_null=True)
    except strict_json.BadJson:
        return {}


def _of_object(facts: dict[str, Any]) -> ToolRecord | None:
    if isinstance(swarm := facts.get("sui_image_params"), dict):
        facts = swarm | ({"Schedule type": swarm["scheduler"]} if "scheduler" in swarm else {})
    elif (
        facts.get("metadata_scheme") == "fooocus"
        or {"base_model", "guidance_scale", "scheduler"} <= facts.keys()
    ):
        facts = facts | {"Schedule type": facts.get("scheduler")}
    elif isinstance(image := facts.get("image"), dict) and "app_id" in facts:  # InvokeAI 2
        facts = image
    if (record := comfyui.read(facts)) is not None:
        return record
    return _flat(facts)


def _flat(facts: Mapping[str, Any]) -> ToolRecord | None:
    """Settings of one object by any of their names; None without a prompt and one setting besides."""
    by_key = {re.sub(r"[^a-z0-9]", "", key.lower()): value for key, value in facts.items()}
    values = {}
    for name, keys in _NAMES.items():
        texts = (_text(by_key.get(key)) for key in keys)
        if text := next((t for t in texts if t), ""):
            values[name] = text
    prompt, negative = values.pop("prompt", ""), values.pop("negative", "")
    if not prompt or not values:
        return None
    if not negative and isinstance(facts.get("prompt"), list):  # InvokeAI 2 writes [what to avoid]
        negative = " ".join(re.findall(r"\[([^\[\]]*)\]", prompt))
        prompt = re.sub(r"\s*\[[^\[\]]*\]", "", prompt).strip()
    if size := _size(by_key):
        values["Size"] = size
    return ToolRecord(prompt, negative, values)


def _size(by_key: Mapping[str, Any]) -> str:
    for names in _SIZES:
        sides = [_text(by_key.get(n)) for n in names]
        if all(s.isdecimal() for s in sides):
            return "x".join(sides)
    match = re.fullmatch(
        r"\D{0,3}(\d{1,5})\D{1,4}(\d{1,5})\D{0,3}", _text(by_key.get("resolution") or by_key.get("size"))
    )
    return f"{match[1]}x{match[2]}" if match else ""


def _text(value: Any) -> str:
    """A setting as text; "" for one that is none. A list of InvokeAI 2's weighted prompts is joined."""
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, int | float):
        return comfyui.number(value)
    if isinstance(value, dict):  # a model of InvokeAI
        return _text(value.get("name") or value.get("model_name") or value.get("prompt"))
    if isinstance(value, list):
        return ", ".join(t for t in map(_text, value[:20]) if t) if value and isinstance(value[0], dict) else ""
    return re.sub(r"^(\d+)\.0+$", r"\1", value.strip()) if isinstance(value, str) else ""


def _dream(text: str) -> ToolRecord | None:
    """InvokeAI 1: `"a cat [rain]" -s 20 -S 123 -W 512 -H 512 -C 7.5 -A k_lms`."""
    try:
        words = shlex.split(text[:20_000])
    except ValueError:
        return None
    values, prompt = dict[str, str](), list[str]()
    for k, word in enumerate(words):
        match = re.fullmatch(r"-([A-Za-z])([\w.+-]*)", word)
        if match and match[1] in _DREAM:
            after = words[k + 1] if k + 1 < len(words) else ""
            values[_DREAM[match[1]]] = match[2] or after
        elif not values and not word.startswith("-"):
            prompt.append(word)
    if not prompt or not values:
        return None
    return _flat({"prompt": [{"prompt": " ".join(prompt)}], **values})
