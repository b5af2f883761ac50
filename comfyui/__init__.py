"""Minikin concepts in ComfyUI: a node that loads concept files, and one that encodes prompts which name them.

The reader of concept files and the edit are Minikin's own modules. They come from an installed Minikin, or from
`lib/` beside this file, where `tools/comfyui_pack.py` puts the few that are needed.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("minikin") is None:
    sys.path.append(str(Path(__file__).parent / "lib"))

try:
    from comfy_api.latest import ComfyExtension

    from .nodes_v3 import NODES

    class MinikinExtension(ComfyExtension):
        async def get_node_list(self):
            return NODES

    async def comfy_entrypoint():
        return MinikinExtension()

except ImportError:  # ComfyUI before its V3 nodes
    from .nodes_v1 import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
