"""Minikin concepts in ComfyUI: a node that loads concept files, and one that encodes prompts which name them.

The reader of concept files and the edit are Minikin's own modules. They are in `lib/` beside this file, where
`tools/comfyui_pack.py` puts those that are needed, and in a checkout in src/.
"""

import sys
from pathlib import Path

LIB = Path(__file__).parent / "lib"
if LIB.is_dir():
    sys.path.insert(0, str(LIB))  # before a Minikin of another version

try:
    from comfy_api.latest import ComfyExtension
except ImportError:  # ComfyUI before its V3 nodes
    ComfyExtension = None

if ComfyExtension is None:
    from .nodes_v1 import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
else:
    from .nodes_v3 import NODES

    class MinikinExtension(ComfyExtension):
        async def get_node_list(self):
            return NODES

    async def comfy_entrypoint():
        return MinikinExtension()
