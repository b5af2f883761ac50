"""The nodes as classes with INPUT_TYPES, for ComfyUI before V3."""

from __future__ import annotations

from minikin.limits import MAX_STRENGTH

from . import nodes
from .concepts import REGIONS, file_names
from .nodes import HELP


def _share(name, default):
    return "FLOAT", {"default": default, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": HELP[name]}


class LoadConcept:
    CATEGORY, DESCRIPTION, FUNCTION = nodes.CATEGORY, nodes.ABOUT[nodes.LOAD], "load"
    RETURN_TYPES, RETURN_NAMES = (nodes.CONCEPTS,), ("concepts",)

    @classmethod
    def INPUT_TYPES(cls):
        strength = {"default": 1.0, "min": 0.0, "max": MAX_STRENGTH, "step": 0.05, "tooltip": HELP["strength"]}
        return {
            "required": {
                "file": (file_names(), {"tooltip": HELP["file"]}),
                "strength": ("FLOAT", strength),
                "start": _share("start", 0.0),
                "end": _share("end", 1.0),
                "region": (list(REGIONS), {"tooltip": HELP["region"]}),
            },
            "optional": {
                "box": ("STRING", {"default": "", "tooltip": HELP["box"]}),
                "name": ("STRING", {"default": "", "tooltip": HELP["name"]}),
                "others": (nodes.CONCEPTS, {"tooltip": HELP["others"]}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, file, **others):
        return nodes.changed(file)

    def load(self, **inputs):
        return (nodes.load(**inputs),)


class EncodePrompt:
    CATEGORY, DESCRIPTION, FUNCTION = nodes.CATEGORY, nodes.ABOUT[nodes.ENCODE], "encode"
    RETURN_TYPES, RETURN_NAMES = ("MODEL", "CONDITIONING"), ("model", "conditioning")

    @classmethod
    def INPUT_TYPES(cls):
        text = {"multiline": True, "dynamicPrompts": True, "tooltip": HELP["text"]}
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "text": ("STRING", text),
                "concepts": (nodes.CONCEPTS,),
            }
        }

    def encode(self, model, clip, text, concepts):
        return nodes.encode_prompt(model, clip, text, concepts)


NODE_CLASS_MAPPINGS = {nodes.LOAD: LoadConcept, nodes.ENCODE: EncodePrompt}
NODE_DISPLAY_NAME_MAPPINGS = nodes.TITLES
