"""Imports point down only, and starting up stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import minikin

ROOT = Path(minikin.__file__).parent
# from the top down; a module may import from its own layer and from those below
LAYERS = (
    ("cli", "web"), ("cluster",), ("server",), ("studio",), ("evaluation",),
    ("baselines", "distillation", "generation"), ("perfusion",), ("training",), ("models",),
    ("images", "recipes"),
    ("files", "events", "stream"), ("errors",),
)  # fmt: skip
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """First names of the minikin modules a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minikin"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("minikin.")}
    return names


def test_imports_point_down() -> None:
    upward = []
    for path in ROOT.rglob("*.py"):
        package = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if package not in LEVEL:  # the package's front page; tiny, which is checked below
            continue
        for name in imports(path):
            if name in LEVEL and LEVEL[name] < LEVEL[package]:
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upward


def test_concept_files_and_the_edit_need_no_model() -> None:
    names = ("concept", "concept_file", "edit", "index", "library", "operating_points", "strict_safetensors")
    for name in names:
        text = (ROOT / "perfusion" / f"{name}.py").read_text()
        assert "diffusers" not in text.replace("diffusers'", "")
        assert "transformers" not in text


def test_the_product_does_not_need_the_world() -> None:
    """Only tiny itself draws its world; nothing else imports it but a data source and the evaluation of its
    images."""
    may = {"distillation/scenes.py", "evaluation/tiny_encoders.py"}
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] != "tiny" and path.relative_to(ROOT).as_posix() not in may:
            assert "tiny" not in imports(path), path


def test_importing_is_light() -> None:
    """`import minikin` and the command line load no torch, no diffusers, no numpy."""
    heavy = "[m for m in ('torch', 'diffusers', 'numpy') if m in sys.modules]"
    code = f"import sys, minikin, minikin.cli.app; print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_files_stay_short() -> None:
    """Median and maximum length of the package's files."""
    lengths = sorted(len(p.read_text().splitlines()) for p in ROOT.rglob("*.py"))
    assert lengths[-1] <= 500
    assert lengths[len(lengths) // 2] <= 250
