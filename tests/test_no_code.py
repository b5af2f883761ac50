"""Files bring no code: nothing is unpickled, bases are safetensors, and a folder's programs are not run."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minikin
from minikin.bases.opening import pull as hub
from minikin.bases.opening import registry
from minikin.errors import BadModelFile

ROOT = Path(minikin.__file__).parent
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "_pickle"}
CALLS = {"eval", "exec", "torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
         "yaml.load", "np.load(pickled)", "numpy.load(pickled)", "os.system", "os.popen"}  # fmt: skip
# classes that read JSON and text alone; every other from_pretrained reads weights
TEXT_ONLY = ("Tokenizer", "Processor", "Config", "Scheduler")


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name; what is no name is "?"."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def problems(text: str, where: str) -> Iterator[str]:
    """What in a program could run code out of a file it reads."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{where}:{node.lineno} imports {n}" for n in names if n.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        told = {k.arg: k.value for k in node.keywords}
        name = dotted(node.func)
        if name in ("np.load", "numpy.load") and not _is(told.get("allow_pickle"), False, missing=True):
            name += "(pickled)"
        if name in CALLS:
            yield f"{where}:{node.lineno} calls {name}"
        if "trust_remote_code" in told or "custom_pipeline" in told or "weights_only" in told:
            yield f"{where}:{node.lineno} trusts the code of a repository"
        tail = name.rsplit(".", 1)[-1]
        if tail == "from_pretrained" and not any(w in name for w in TEXT_ONLY):
            shared = any(k is None for k in told)  # **how: looked for in the same file
            if not _is(told.get("use_safetensors"), True) and not (
                shared and '"use_safetensors": True' in text
            ):
                yield f"{where}:{node.lineno} may open pickled weights"


def _is(node: ast.expr | None, value: bool, missing: bool = False) -> bool:
    return missing if node is None else isinstance(node, ast.Constant) and node.value is value


def test_nothing_is_unpickled_anywhere() -> None:
    found = [
        p for f in sorted(ROOT.rglob("*.py")) for p in problems(f.read_text(), f.relative_to(ROOT).as_posix())
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "import os, dill.settings", "torch.load(path)",
        "torch.load(path, weights_only=True)", "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=p)",
        "exec(text)", "UNet.from_pretrained(path)", "UNet.from_pretrained(path, use_safetensors=None)",
        "D.from_pretrained(p, use_safetensors=True, trust_remote_code=True)",
        "D.from_pretrained(p, use_safetensors=True, custom_pipeline='x')",
    ],
)  # fmt: skip
def test_the_walk_finds_each_of_them(line: str) -> None:
    """The positive control."""
    assert list(problems(line, "x"))


@pytest.mark.parametrize(
    "line",
    ["np.load(p)", "np.load(p, allow_pickle=False)", "UNet.from_pretrained(p, use_safetensors=True)",
     "CLIPTokenizer.from_pretrained(p)", "model.eval()", "Model().eval()", "model.load(p)"],
)  # fmt: skip
def test_the_walk_lets_sound_lines_pass(line: str) -> None:
    assert not list(problems(line, "x"))


# ---- bases that bring code ---------------------------------------------------------------------------

EVIL = "from pathlib import Path\nPath({!r}).mkdir()\n" + (
    "class Evil:\n    from_pretrained = classmethod(lambda c, *a, **k: c())\n"
)


@pytest.fixture
def folder(pipelines: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "base"
    pipelines["sd15"].save_pretrained(path)
    return path


def _index(folder: Path, **values: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _of_its_own(folder: Path) -> None:
    _index(folder, unet=["evil", "Evil"])


def _of_the_machine(folder: Path) -> None:
    _index(folder, unet=["os", "system"])


def _pipeline(folder: Path) -> None:
    _index(folder, _class_name=["evil", "StableDiffusionPipeline"])


def _shadowing(folder: Path) -> None:
    """A program of the name of a library, in a part's own folder."""
    (folder / "unet" / "evil.py").rename(folder / "unet" / "diffusers.py")


def _mapped(folder: Path) -> None:
    (folder / "unet" / "evil.py").unlink()
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "evil.Evil"}}))


@pytest.mark.parametrize("how", [_of_its_own, _of_the_machine, _pipeline, _shadowing, _mapped])
def test_a_folder_that_brings_code_is_refused(folder: Path, tmp_path: Path, how: Any) -> None:
    ran = tmp_path / "ran"
    for place in (folder, folder / "unet"):
        (place / "evil.py").write_text(EVIL.format(str(ran)))
    how(folder)
    for step in (registry.add, lambda path: registry.open_base(str(path), device="cpu")):
        with pytest.raises(
            BadModelFile, match=r"brings? (code|programs)|Expected a class of diffusers|of its own"
        ):
            step(folder)
    assert not ran.exists()


def test_the_refusal_is_ours(folder: Path, monkeypatch: Any) -> None:
    """The positive control: without the check such a folder is added (diffusers 0.42 would not open it)."""
    _index(folder, unet=["evil_library", "Evil"])
    monkeypatch.setattr(registry, "_refuse_code", lambda path, index: None)
    assert registry.add(folder).name == "base"


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    """A folder with .bin weights alone: refused, although the libraries could read them."""
    import torch
    from safetensors.torch import load_file

    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(str(weights)), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(BadModelFile, match="safetensors"):
        registry.open_base(str(folder), device="cpu")


@pytest.mark.parametrize("sha", [None, "", "main", "../../x"])
def test_a_pull_without_a_commit_is_refused(monkeypatch: Any, sha: str | None) -> None:
    facts = {"sha": sha, "siblings": [{"rfilename": "unet/a.safetensors", "size": 1}]}
    monkeypatch.setattr(hub, "_get", lambda url, repo: json.dumps(facts).encode())
    with pytest.raises(BadModelFile, match="which commit"):
        hub.plan("owner/name")


def test_a_pull_takes_every_file_of_one_commit(monkeypatch: Any) -> None:
    facts = {"sha": "ab" * 20, "siblings": [{"rfilename": "unet/a.safetensors", "size": 1},
                                            {"rfilename": "run.py", "size": 1},
                                            {"rfilename": "unet/b.bin", "size": 1},
                                            {"rfilename": "../c.json", "size": 1}]}  # fmt: skip
    monkeypatch.setattr(hub, "_get", lambda url, repo: json.dumps(facts).encode())
    p = hub.plan("owner/name")
    assert p.revision == "ab" * 20 and [f.name for f in p.files] == ["unet/a.safetensors"]
