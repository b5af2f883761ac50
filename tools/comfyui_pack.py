"""Write the ComfyUI node pack into a folder that ComfyUI loads, with the modules of Minikin that it needs.

    python tools/comfyui_pack.py ComfyUI/custom_nodes/minikin

The nodes are comfyui/. The reader of concept files and the edit are Minikin's own modules, copied here to
FOLDER/lib, so that there is one source of both.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
USED = (  # what comfyui/*.py imports of Minikin
    "minikin.perfusion.concept_file", "minikin.perfusion.conditioning", "minikin.models.regions",
    "minikin.models.unet_names", "minikin.limits",
)  # fmt: skip


def modules() -> list[Path]:
    """The files of the modules in USED and of all that they import, relative to src/."""
    script = (
        f"import importlib, json, sys; [importlib.import_module(m) for m in {USED!r}]; "
        "print(json.dumps([m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'minikin']))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SOURCE)!r}); {script}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sorted(Path(file).relative_to(SOURCE) for file in json.loads(out))


def write(folder: Path) -> None:
    """Write the pack; files of an earlier one are replaced, and a folder with anything else is refused."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "nodes_v3.py").is_file():
        sys.exit(
            f"{folder} holds something else than the node pack. Give a new folder, for example "
            "ComfyUI/custom_nodes/minikin."
        )
    shutil.rmtree(folder / "lib", ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "comfyui", folder, dirs_exist_ok=True, ignore=ignored)
    shutil.copy(ROOT / "LICENSE", folder)
    for file in modules():
        place = folder / "lib" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCE / file, place)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Give the folder to write: python tools/comfyui_pack.py ComfyUI/custom_nodes/minikin")
    write(Path(sys.argv[1]))
    print(f"Wrote the node pack to {sys.argv[1]}. Restart ComfyUI, and put concepts into its models/minikin.")
