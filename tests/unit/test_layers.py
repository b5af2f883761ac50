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
    ("files", "events", "stream", "strict_json", "printable"), ("errors", "limits"),
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


def test_methods_do_not_know_each_other() -> None:
    """What the baselines and distillation share lies below them, in training/ and models/."""
    for package, other in (("baselines", "distillation"), ("distillation", "baselines")):
        assert not [p for p in (ROOT / package).rglob("*.py") if other in imports(p)]


def dependencies() -> dict[str, set[str]]:
    """The modules that each module of the package imports, also inside functions, but not for types alone."""
    modules = {".".join(("minikin", *p.relative_to(ROOT).with_suffix("").parts)): p for p in ROOT.rglob("*.py")}
    graph = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                node.body = []
        imported = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
        full = {f"{n.module}.{a.name}" for n in imported for a in n.names} | {str(n.module) for n in imported}
        graph[name] = full & set(modules)
    return graph


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Pairs of modules that reach each other."""
    reach = {name: set(direct) for name, direct in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    return {frozenset((a, b)) for a in graph for b in reach[a] if a != b and a in reach[b]}


def test_no_module_imports_itself_through_others() -> None:
    """But for Concept.save and Concept.load, which stand for the functions of concept_file."""
    sugar = frozenset(("minikin.perfusion.concept", "minikin.perfusion.concept_file"))
    assert circles(dependencies()) == {sugar}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {
        frozenset(pair) for pair in ("ab", "ac", "bc")
    }


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
