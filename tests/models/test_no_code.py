"""No file executes code: nothing is unpickled, bases are safetensors, and programs in folders are not run."""

from __future__ import annotations

import ast
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import minikin
from minikin.errors import BadModelFile, BadRecipe
from minikin.models.loading import hub, registry
from minikin.models.loading.convert import convert
from minikin.models.loading.legacy_checkpoint import KINDS

ROOT = Path(minikin.__file__).parent
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "_pickle"}
MODULES |= {"shelve"}  # word: module name
CALLS = {"eval", "exec", "torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter",
         "yaml.load", "np.load(pickled)", "numpy.load(pickled)", "os.system", "os.popen"}  # fmt: skip
# classes that read JSON and text only; every other from_pretrained reads weights
TEXT_ONLY = ("Tokenizer", "Processor", "Config", "Scheduler")


def dotted(node: ast.expr) -> str:
    """A dotted name as text; "?" for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def problems(text: str, where: str) -> Iterator[str]:
    """Lines of a program that could execute code from a file it reads."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{where}:{node.lineno} imports {n}" for n in names if n.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: k.value for k in node.keywords}
        name = dotted(node.func)
        if name in ("np.load", "numpy.load") and not _is(keywords.get("allow_pickle"), False, missing=True):
            name += "(pickled)"
        if name in CALLS:
            yield f"{where}:{node.lineno} calls {name}"
        if "trust_remote_code" in keywords or "custom_pipeline" in keywords or "weights_only" in keywords:
            yield f"{where}:{node.lineno} trusts the code of a repository"
        tail = name.rsplit(".", 1)[-1]
        if tail == "from_pretrained" and not any(w in name for w in TEXT_ONLY):
            shared = any(k is None for k in keywords)  # **options: searched in the same file
            if not _is(keywords.get("use_safetensors"), True) and not (
                shared and '"use_safetensors": True' in text
            ):
                yield f"{where}:{node.lineno} may open pickled weights"


def _is(node: ast.expr | None, value: bool, missing: bool = False) -> bool:
    return missing if node is None else isinstance(node, ast.Constant) and node.value is value


def test_nothing_is_unpickled_anywhere() -> None:
    lines = [
        p for f in sorted(ROOT.rglob("*.py")) for p in problems(f.read_text(), f.relative_to(ROOT).as_posix())
    ]
    assert lines == []


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
def test_the_check_finds_dangerous_lines(line: str) -> None:
    """The positive control."""
    assert list(problems(line, "x"))


@pytest.mark.parametrize(
    "line",
    ["np.load(p)", "np.load(p, allow_pickle=False)", "UNet.from_pretrained(p, use_safetensors=True)",
     "CLIPTokenizer.from_pretrained(p)", "model.eval()", "Model().eval()", "model.load(p)"],
)  # fmt: skip
def test_the_check_accepts_safe_lines(line: str) -> None:
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


def _only(folder: Path, place: str) -> None:
    for program in folder.rglob("*.py"):
        program.unlink()
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).write_text("print('ran')")


def _pipeline_program(folder: Path) -> None:
    _only(folder, "pipeline.py")


def _deep(folder: Path) -> None:
    _only(folder, "unet/a/b/model.py")


def _library(folder: Path) -> None:
    _only(folder, "vae/fast.so")


def _mapped_deep(folder: Path) -> None:
    _only(folder, "tokenizer/tokenizer_config.json")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        '{"a": [{"auto\\u005fmap": {"x": "evil.Evil"}}]}'
    )


def _list(folder: Path) -> None:
    (folder / "model_index.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    "how",
    [
        _of_its_own,
        _of_the_machine,
        _pipeline,
        _shadowing,
        _mapped,
        _pipeline_program,
        _deep,
        _library,
        _mapped_deep,
        _list,
    ],
)
def test_a_folder_that_brings_code_is_refused(folder: Path, tmp_path: Path, how: Any) -> None:
    ran = tmp_path / "ran"
    for place in (folder, folder / "unet"):
        (place / "evil.py").write_text(EVIL.format(str(ran)))
    how(folder)
    for step in (registry.add, lambda path: registry.open_base(str(path), device="cpu")):
        with pytest.raises(
            BadModelFile,
            match=r"brings? (code|programs)|Expected a class of diffusers|of its own|a list, not an object",
        ):
            step(folder)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", ".hidden", "a\0b", "x" * 81, "a b", "a\nb"])
def test_a_name_cannot_leave_the_folder(folder: Path, name: str) -> None:
    before = sorted(registry.models_folder().rglob("*"))
    with pytest.raises(BadRecipe, match="cannot be a model's name"):
        registry.add(folder, name)
    assert sorted(registry.models_folder().rglob("*")) == before


def test_the_check_is_what_refuses_code(folder: Path, monkeypatch: Any) -> None:
    """Positive control: without the check such a folder is added (diffusers 0.42 would not open it)."""
    _index(folder, unet=["evil_library", "Evil"])
    monkeypatch.setattr(registry, "refuse_code", lambda path, index: None)
    monkeypatch.setattr(registry.diffusers_folder, "check", lambda path: None)
    assert registry.add(folder).name == "base"


def test_pickled_weights_of_a_folder_are_not_opened(folder: Path) -> None:
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


def test_the_safety_checker_is_pulled_from_its_folder(monkeypatch: Any) -> None:
    """Only the safety checker of a base's repository, in half precision if available."""
    names = ["safety_checker/config.json", "safety_checker/model.safetensors", "unet/config.json",
             "safety_checker/model.fp16.safetensors", "safety_checker/pytorch_model.bin"]  # fmt: skip
    facts = {"sha": "ab" * 20, "siblings": [{"rfilename": n, "size": 1} for n in names]}
    monkeypatch.setattr(hub, "_get", lambda url, repo: json.dumps(facts).encode())
    assert [f.name for f in hub.plan("safety-checker").files] == [names[0], names[3]]


def test_a_pull_takes_one_precision_of_sharded_weights(monkeypatch: Any) -> None:
    """As in Sana_1600M_1024px_BF16_diffusers: bfloat16 where there is some, with its index; and T5's words."""
    needed = [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "text_encoder/model.bf16-00001-of-00002.safetensors",
        "text_encoder/model.bf16-00002-of-00002.safetensors", "text_encoder/model.safetensors.index.bf16.json",
        "tokenizer/spiece.model", "tokenizer/tokenizer.json",
        "transformer/config.json", "transformer/diffusion_pytorch_model.bf16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    others = [
        "text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json", "transformer/diffusion_pytorch_model.int4.safetensors",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json", "asset/x.safetensors",
    ]  # fmt: skip
    facts = {"sha": "ab" * 20, "siblings": [{"rfilename": n, "size": 1} for n in sorted(needed + others)]}
    monkeypatch.setattr(hub, "_get", lambda url, repo: json.dumps(facts).encode())
    assert [f.name for f in hub.plan("sana").files] == sorted(needed)


def test_a_pull_can_be_pinned_to_a_revision(monkeypatch: Any) -> None:
    """To a commit, or to the pull request that brings safetensors; files are of the commit it stands for."""
    urls: list[str] = []
    facts = {"sha": "cd" * 20, "siblings": [{"rfilename": "model.safetensors", "size": 1}]}
    monkeypatch.setattr(hub, "_get", lambda url, repo: urls.append(url) or json.dumps(facts).encode())
    for revision, part in (
        (None, "/openai/clip-vit-base-patch32?"),
        ("ab12cd3", "/revision/ab12cd3?"),
        ("refs/pr/66", "/revision/refs%2Fpr%2F66?"),
        ("../../x", "/revision/..%2F..%2Fx?"),
    ):
        assert hub.plan("clip-b32", revision).revision == "cd" * 20
        assert part in urls[-1]


def test_an_encoder_published_only_as_a_pickle_is_refused_with_advice(monkeypatch: Any) -> None:
    names = ["config.json", "pytorch_model.bin"]
    facts = {"sha": "ab" * 20, "siblings": [{"rfilename": n, "size": 1} for n in names]}
    monkeypatch.setattr(hub, "_get", lambda url, repo: json.dumps(facts).encode())
    with pytest.raises(BadModelFile, match="minikin models convert .*/dino-s16/pytorch_model.bin"):
        hub.plan("dino-s16")


# ---- conversion of PyTorch files ---------------------------------------------------------------------


def weights() -> dict[str, Any]:
    """Every dtype and memory layout that torch.save writes."""
    torch.manual_seed(0)
    whole = torch.randn(6, 4)
    return OrderedDict(
        a=torch.randn(3, 5), turned=whole.t(), part=whole[2:4], half=torch.randn(4).half(),
        brain=torch.randn(4).bfloat16(), wide=torch.randn(2).double(), count=torch.arange(5),
        small=torch.tensor([1, -2], dtype=torch.int8),
        byte=torch.tensor([1, 200], dtype=torch.uint8), short=torch.arange(3, dtype=torch.int16),
        middle=torch.arange(3, dtype=torch.int32), none=torch.empty(0, 3), one=torch.tensor(2.5),
        learned=torch.nn.Parameter(torch.randn(2)), truth=torch.tensor([True, False]),
    )  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_converted_weights_are_bit_identical(protocol: int, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    old, expected = tmp_path / "pytorch_model.bin", weights()
    expected._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    assert len({tensor.dtype for tensor in expected.values()}) == len(KINDS)
    torch.save(expected, old, pickle_protocol=protocol)
    new, n = convert(old)
    read = load_file(new)
    assert new.name == "model.safetensors" and n == len(expected) and set(read) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype, name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "pytorch_model.bin"]
    with pytest.raises(BadRecipe, match="exists already"):
        convert(old)


def test_checkpoints_and_embeddings_are_converted(tmp_path: Path) -> None:
    """The nesting of Lightning and of A1111; everything but tensors is left out."""
    from safetensors.torch import load_file

    checkpoint = {"state_dict": weights(), "epoch": 3, "optimizer": [{"lr": 0.1, "betas": (0.9, 0.99)}, None]}
    torch.save(checkpoint, tmp_path / "model.ckpt")
    assert set(load_file(convert(tmp_path / "model.ckpt")[0])) == set(weights())
    torch.save({"string_to_param": {"*": torch.ones(2, 8)}, "name": "x", "step": 1}, tmp_path / "x.pt")
    assert set(load_file(convert(tmp_path / "x.pt")[0])) == {"emb_params"}


class Hostile:
    """Calls a function when it is unpickled."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


def test_nothing_of_a_hostile_file_is_executed(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for k, (call, args) in enumerate([(os.mkdir, (str(ran),)), (eval, ("1",)), (torch.zeros, (3,)),
                                      (getattr, ("x", "upper"))]):  # fmt: skip
        file = tmp_path / f"{k}.bin"
        torch.save({"a": torch.ones(2), "b": Hostile(call, *args)}, file)
        with pytest.raises(BadModelFile, match=r"was not converted: it .*Nothing of it was executed"):
            convert(file)
    assert not ran.exists() and not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))
    torch.load(tmp_path / "0.bin", weights_only=False)
    assert ran.exists()  # positive control: it runs when it is unpickled


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: p.write_bytes(b"not an archive"), "no archive"),
        (lambda p: torch.save(weights(), p, _use_new_zipfile_serialization=False), "before 1.6"),
        (lambda p: torch.save([1, 2], p), "of a list"),
        (lambda p: torch.save({"a": 1}, p), "no tensors"),
        (lambda p: torch.save({"a": torch.ones(1).as_strided((1 << 26,), (0,))}, p), "twice"),
    ],
)  # fmt: skip
def test_files_without_a_model_are_refused(make: Any, why: str, tmp_path: Path) -> None:
    make(tmp_path / "x.bin")
    with pytest.raises(BadModelFile, match=why):
        convert(tmp_path / "x.bin")
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_damaged_pickles_are_refused() -> None:
    """2,000 mutations are read or refused, without other exceptions or tensors outside their entry."""
    import io
    import random
    import zipfile

    from minikin.models.loading import legacy_checkpoint

    file = io.BytesIO()
    torch.save(weights(), file)
    with zipfile.ZipFile(file) as z:
        code = z.read(next(n for n in z.namelist() if n.endswith("data.pkl")))
        sizes = {n.rpartition("/")[2]: z.getinfo(n).file_size for n in z.namelist()}
    rng, read = random.Random(0), 0
    for _ in range(2000):
        data = bytearray(code)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            for name, t in legacy_checkpoint.tensors(legacy_checkpoint.Program(bytes(data))).items():
                legacy_checkpoint._bytes(
                    t, legacy_checkpoint.KINDS[t.storage.kind][1], sizes.get(t.storage.entry, 0), name
                )
            read += 1
        except legacy_checkpoint.DAMAGE:
            pass
    assert 0 < read < 1500


def test_the_converting_process_is_restricted(tmp_path: Path, monkeypatch: Any) -> None:
    """A reader that tries to read secrets, and to take memory and disk, fails; it may only write a small file.

    Connections are refused if the kernel has user namespaces.
    """
    from minikin.models.loading import convert as converting

    monkeypatch.setenv("SECRET", "word")
    tries = """
import os, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
told = []
for name, do in (("secret", lambda: os.environ["SECRET"]),
                 ("large", lambda: [open(sys.argv[2], "wb", 0).write(b"x" * (1 << 20)) for f in ["x"]][0]
                                   and os.truncate(sys.argv[2], 1 << 30)),
                 ("memory", lambda: bytearray(4 << 30)),
                 ("small", lambda: open(sys.argv[2], "wb").write(b"x"))):
    try:
        do(); told.append(name)
    except (OSError, KeyError, MemoryError):
        pass
sys.stderr.write("could " + " ".join(told)); sys.exit(3)
"""
    child = converting._CHILD.replace("sys.exit(main(*sys.argv[1:]))", tries)
    assert child != converting._CHILD
    monkeypatch.setattr(converting, "_CHILD", child)
    torch.save(weights(), tmp_path / "x.bin")
    with pytest.raises(BadModelFile, match="not converted: could small. Nothing"):
        convert(tmp_path / "x.bin")
