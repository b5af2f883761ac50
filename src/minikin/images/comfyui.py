"""ComfyUI's graphs as prompt, negative prompt and settings: the API's ("prompt") and the editor's ("workflow").

From the node that saves the image the links lead back to its sampler, and over further samplers (a second
pass at a higher resolution) to the first, which drew the image. From there they lead to the texts of its
conditionings. Nodes that are not known are passed through where the links allow it; where a text is not found,
none is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class ToolRecord(NamedTuple):
    """What a tool recorded: prompt, negative prompt, and settings under A1111's names."""

    prompt: str
    negative: str
    settings: dict[str, str]


Graph = dict[str, dict[str, Any]]  # {"class_type": ..., "inputs": {name: value, or [node, output]}} by node
MAX_HOPS = 200  # links that are followed for one answer
_SETTINGS = {  # A1111's name -> inputs of samplers and of what leads to them
    "Seed": ("seed", "noise_seed"), "Steps": ("steps",), "CFG scale": ("cfg", "cfg_scale"),
    "Sampler": ("sampler_name",), "Schedule type": ("scheduler",),
}  # fmt: skip
_SIZES = (("width", "height"), ("empty_latent_width", "empty_latent_height"))
_TEXTS = ("text", "text_g", "text_l", "t5xxl", "clip_l", "clip_g", "prompt", "positive", "string", "value")
_PARTS = ("string_a", "string_b", "text1", "text2", "text_a", "text_b", "text_c", "text_d")
_CONDITIONINGS = ("conditioning", "conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from")
_TO_SAMPLING = ("guider", "sampler", "sigmas", "noise")  # of SamplerCustomAdvanced
# the editor stores values of widgets in their order, without names
_WIDGETS: dict[str, tuple[str, ...]] = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler"),
    "SamplerCustom": ("add_noise", "noise_seed", "", "cfg"),
    "RandomNoise": ("noise_seed",), "KSamplerSelect": ("sampler_name",), "CFGGuider": ("cfg",),
    "BasicScheduler": ("scheduler", "steps", "denoise"), "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("", "", "", "", "", "", "text_g", "text_l"),
    "CLIPTextEncodeFlux": ("clip_l", "t5xxl"),
    "EmptyLatentImage": ("width", "height"), "EmptySD3LatentImage": ("width", "height"),
    "CheckpointLoaderSimple": ("ckpt_name",), "PrimitiveNode": ("value",), "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",), "PrimitiveInt": ("value",), "PrimitiveFloat": ("value",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
}  # fmt: skip


def read(graph: Mapping[str, Any]) -> ToolRecord | None:
    """Prompt and settings of a graph of either kind; None for no graph, or where no text is found."""
    nodes = _of_editor(graph) if isinstance(graph.get("nodes"), list) else _of_api(graph)
    sampler = _first_sampler(nodes)
    if sampler is None:
        return None
    prompt, negative = (_conditioning(nodes, sampler, side) for side in ("positive", "negative"))
    settings = {}
    near = [nodes[n] for n in _upstream(nodes, sampler, _TO_SAMPLING)]
    for name, keys in _SETTINGS.items():
        values = (_value(nodes, node["inputs"][key]) for node in near for key in keys if key in node["inputs"])
        settings[name] = next((v for v in values if v), "")
    latent = nodes[sampler]["inputs"].get("latent_image")
    start = [nodes[n] for n in _upstream(nodes, _node(latent), None)] if latent is not None else []
    of_nodes = ([_value(nodes, node["inputs"].get(k)) for k in names] for node in start for names in _SIZES)
    settings["Size"] = next(("x".join(sides) for sides in of_nodes if all(s.isdecimal() for s in sides)), "")
    names = (_value(nodes, n["inputs"].get("ckpt_name")) for n in nodes.values())
    settings["Model"] = next((n for n in names if n), "")
    settings = {k: v for k, v in settings.items() if v}
    return ToolRecord(prompt, negative, settings) if prompt else None


def _of_api(graph: Mapping[str, Any]) -> Graph:
    return {
        str(key): {"class_type": node["class_type"], "inputs": node["inputs"]}
        for key, node in graph.items()
        if isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
    }


def _of_editor(workflow: Mapping[str, Any]) -> Graph:
    """The editor's nodes and links as the API's graph; nodes that are muted are left out."""
    links = workflow.get("links")
    source = {}
    for link in links if isinstance(links, list) else ():
        if isinstance(link, list) and len(link) >= 5 and isinstance(link[0], int):
            source[link[0]] = [str(link[1]), link[2]]
        elif isinstance(link, dict) and isinstance(link.get("id"), int):
            source[link["id"]] = [str(link.get("origin_id")), link.get("origin_slot")]
    graph: Graph = {}
    for node in workflow["nodes"]:
        if not isinstance(node, dict) or not isinstance(node.get("type"), str) or node.get("mode") == 2:
            continue
        widgets, slots = node.get("widgets_values"), node.get("inputs")
        inputs = dict(widgets) if isinstance(widgets, dict) else {}
        if isinstance(widgets, list):
            names = _WIDGETS.get(node["type"], ())
            inputs = {
                n: v for n, v in zip(names, widgets, strict=False) if n and isinstance(v, str | int | float)
            }
        for slot in slots if isinstance(slots, list) else ():
            if isinstance(slot, dict) and isinstance(slot.get("link"), int) and slot["link"] in source:
                inputs[str(slot.get("name"))] = source[slot["link"]]
        graph[str(node.get("id"))] = {"class_type": node["type"], "inputs": inputs}
    return graph


def _first_sampler(nodes: Graph) -> str | None:
    """The sampler that drew the image: of those the saved image depends on, the one that no other precedes."""
    outputs = [k for k, n in nodes.items() if "saveimage" in n["class_type"].replace(" ", "").lower()]
    outputs = outputs or [k for k, n in nodes.items() if "save" in n["class_type"].lower()] or list(nodes)
    for output in outputs:
        samplers = [k for k in _upstream(nodes, output, None) if _is_sampler(nodes[k])]
        if samplers:
            return samplers[-1]
    return None


def _is_sampler(node: Mapping[str, Any]) -> bool:
    inputs = node["inputs"]
    guided = "guider" in inputs or (
        "positive" in inputs and bool({"seed", "noise_seed", "steps"} & inputs.keys())
    )
    return guided and bool(
        {"latent_image", "latent", "optional_latent", "noise", "seed", "noise_seed"} & inputs.keys()
    )


def _upstream(nodes: Graph, begin: str | None, through: tuple[str, ...] | None) -> Iterator[str]:
    """Nodes that a node depends on, itself first, the nearest before the others.

    through  names of the inputs that are followed; None for all but conditionings and models
    """
    level, visited = [begin] if begin in nodes else [], set[str]()
    while level and len(visited) < MAX_HOPS:
        following = []
        for key in level:
            if key is None or key in visited or key not in nodes:
                continue
            visited.add(key)
            yield key
            for name, value in nodes[key]["inputs"].items():
                side = name in ("positive", "negative", "model", "clip", "vae", *_CONDITIONINGS)
                if (not side if through is None else name in through) and (node := _node(value)):
                    following.append(node)
        level = following


def _node(value: Any) -> str | None:
    """The node that a link leads to; None for a value."""
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)
    return str(value[0]) if is_link else None


def _conditioning(nodes: Graph, sampler: str, side: str) -> str:
    """The text of a sampler's conditioning on this side, "positive" or "negative"."""
    inputs = nodes[sampler]["inputs"]
    guider = nodes.get(_node(inputs.get("guider")) or "", {"inputs": {}})["inputs"]
    value = inputs.get(side, guider.get(side))
    if value is None and side == "positive":
        value = guider.get("conditioning")
    return ", ".join(dict.fromkeys(_texts(nodes, value, side, set()))).strip()


def _texts(nodes: Graph, value: Any, side: str, visited: set[str]) -> Iterator[str]:
    """Texts that a conditioning or a text input is made of."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
        return
    key = _node(value)
    if key is None or key not in nodes or key in visited or len(visited) > MAX_HOPS:
        return
    visited.add(key)
    node = nodes[key]
    inputs = node["inputs"]
    if "zeroout" in node["class_type"].lower():  # the conditioning of no prompt
        return
    if side in inputs:  # ControlNetApply, loaders and the like hand on both
        yield from _texts(nodes, inputs[side], side, visited)
        return
    conditionings = [inputs[n] for n in _CONDITIONINGS if n in inputs]
    inputs_of_text = [inputs[n] for n in _TEXTS if n in inputs and (n != "value" or not conditionings)]
    parts = [inputs[n] for n in _PARTS if n in inputs]
    following = conditionings or inputs_of_text or parts or [v for v in inputs.values() if _node(v)][:1]
    for item in following:
        yield from _texts(nodes, item, side, visited)


def _value(nodes: Graph, value: Any, hops: int = 0) -> str:
    """A number or a name as text, also when it comes from another node; "" for none."""
    if isinstance(value, bool):
        return ""
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, str):
        return value.strip()[:200]
    key = _node(value)
    if key is None or key not in nodes or hops > 10:
        return ""
    inputs = nodes[key]["inputs"]
    names = ("value", "seed", "noise_seed", "int", "float", "number", "steps", "cfg", "text", "string")
    return next((t for n in names if n in inputs and (t := _value(nodes, inputs[n], hops + 1))), "")


def number(value: float) -> str:
    """A number as text: whole ones in full, as seeds may come as floats."""
    return str(int(value)) if isinstance(value, int) or value.is_integer() else f"{value:g}"
