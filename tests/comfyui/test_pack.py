"""The node pack as it is handed out."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tools import comfyui_pack

import minikin
from minikin.models.base import Base
from tests.comfyui.test_nodes import concept_of

LACKING = ("diffusers", "transformers", "peft", "accelerate", "pydantic", "typer", "rich", "PIL", "jinja2")


def test_the_pack_reads_concepts_without_minikins_packages(bases: dict[str, Base], tmp_path: Path) -> None:
    comfyui_pack.write(tmp_path / "pack")
    concept_of(bases["sd15"], "gated").save(tmp_path / "tom.safetensors")
    script = f"""
import sys
sys.path = [p for p in sys.path if not p.endswith("src")] + [{str(tmp_path / "pack" / "lib")!r}]
for name in {LACKING!r}:
    sys.modules[name] = None
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]
for name in {comfyui_pack.USED!r}:
    __import__(name)
from minikin.perfusion import concept_file
assert concept_file.__file__.startswith({str(tmp_path)!r}), concept_file.__file__
print(concept_file.load({str(tmp_path / "tom.safetensors")!r}).name)
"""
    command = [sys.executable, "-c", script]
    environment = {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.strip() == "tom", done.stderr
    files = [p for p in (tmp_path / "pack").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 300_000
    assert not [p for p in files if p.suffix == ".pyc"] and (tmp_path / "pack" / "LICENSE").is_file()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "python.so").touch()
    with pytest.raises(SystemExit, match="something else"):
        comfyui_pack.write(tmp_path)
    assert (tmp_path / "lib" / "python.so").exists()


def test_the_packs_version_and_workflow_are_of_today(monkeypatch: Any, tmp_path: Path) -> None:
    from tests.helpers import comfy

    facts = tomllib.loads((comfy.PACK / "pyproject.toml").read_text())
    assert facts["project"]["version"] == minikin.__version__
    nodes = comfy.load_pack(monkeypatch, tmp_path, v3=False).NODE_CLASS_MAPPINGS
    workflow = json.loads((comfy.PACK / "example_workflow.json").read_text())
    for node in workflow.values():
        if node["class_type"] in nodes:
            asked = nodes[node["class_type"]].INPUT_TYPES()  # word: inputs of the node
            assert (
                set(asked["required"])
                <= set(node["inputs"])
                <= {*asked["required"], *asked.get("optional", {})}
            )
