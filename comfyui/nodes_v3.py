"""The nodes by ComfyUI's V3 schema."""

from __future__ import annotations

from comfy_api.latest import io

from minikin.limits import MAX_STRENGTH

from . import nodes
from .concepts import REGIONS, file_names
from .nodes import HELP

Concepts = io.Custom(nodes.CONCEPTS)


class LoadConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=nodes.LOAD,
            display_name=nodes.TITLES[nodes.LOAD],
            category=nodes.CATEGORY,
            description=nodes.ABOUT[nodes.LOAD],
            inputs=[
                io.Combo.Input("file", options=file_names(), tooltip=HELP["file"]),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=MAX_STRENGTH, step=0.05, tooltip=HELP["strength"]
                ),
                io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=HELP["start"]),
                io.Float.Input("end", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=HELP["end"]),
                io.Combo.Input("region", options=list(REGIONS), tooltip=HELP["region"]),
                io.String.Input("box", default="", optional=True, tooltip=HELP["box"]),
                io.String.Input("name", default="", optional=True, tooltip=HELP["name"]),
                Concepts.Input("others", optional=True, tooltip=HELP["others"]),
            ],
            outputs=[Concepts.Output("concepts")],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **others):
        return nodes.changed(file)

    @classmethod
    def execute(cls, **inputs):
        return io.NodeOutput(nodes.load(**inputs))


class EncodePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=nodes.ENCODE,
            display_name=nodes.TITLES[nodes.ENCODE],
            category=nodes.CATEGORY,
            description=nodes.ABOUT[nodes.ENCODE],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip=HELP["text"]),
                Concepts.Input("concepts"),
            ],
            outputs=[
                io.Model.Output("patched_model", display_name="model"),
                io.Conditioning.Output("conditioning"),
            ],
        )

    @classmethod
    def execute(cls, model, clip, text, concepts):
        return io.NodeOutput(*nodes.encode_prompt(model, clip, text, concepts))


NODES = [LoadConcept, EncodePrompt]
