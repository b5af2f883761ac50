"""Concept files of strangers: rows C1-C12 of docs/robustness.md, and a hundred thousand damaged files.

A refusal is one error with one sentence and a code; the command line leaves with 3, the server answers
415 for what is no concept file at all, 413 for what is too long, and 422 for the rest, and goes on.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import struct
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.targets import TARGETS

from minikin import Concept, Studio
from minikin.errors import BadConceptFile, BaseMismatch
from minikin.models.base import Base
from minikin.models.prompt import parse
from minikin.perfusion import concept_file
from minikin.perfusion import strict_safetensors as io
from minikin.perfusion.export import read_embedding
from minikin.perfusion.operating_points import NAMES, Point
from minikin.recipes import Teach
from tests.conftest import build_pipeline, command
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.mutations import joined, seeds, split, survey
from tests.helpers.servers import Served, served

VALID = seeds()[2]  # gated, one encoder, half precision
HEADER, BODY = split(VALID)


class Pickled:
    """What a pickle would do if anything opened it."""

    def __init__(self, response: Path) -> None:
        self.told = response

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.told),)


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    header = json.loads(HEADER)
    change(header)
    return joined(json.dumps(header), BODY)


def meta(**values: str) -> bytes:
    return changed(lambda h: h["__metadata__"].update({f"minikin.{k}": v for k, v in values.items()}))


def with_metadata(name: str, **values: Any) -> bytes:
    return changed(lambda h: h[name].update(values))


def zipped(names: list[str]) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name in names:
            z.writestr(name, VALID)
    return buffer.getvalue()


def many_tensors() -> bytes:
    return io.serialize({f"word.{k}": torch.ones(1) for k in range(65)}, {})


def large(name: str, shape: tuple[int, ...]) -> bytes:
    """A concept file with one tensor of this shape."""
    tensors, metadata = io.parse(VALID, "it")
    return io.serialize({**tensors, name: torch.ones(shape).half()}, metadata)


def deep() -> bytes:
    return joined(HEADER.replace('"F16"', "[" * 29_998 + "]" * 29_998, 1), BODY)


def renamed(new: str) -> bytes:
    return changed(lambda h: h.update({new: h.pop("i_star")}))


def twice() -> bytes:
    return joined('{"__metadata__":{},' + HEADER[1:], BODY)


END = json.loads(HEADER)["word.0"]["data_offsets"][1]
THUMB = "modelspec.thumbnail"
POINT = '{"quality":{"judge":"tiny","balanced":[1,%s,7.5,0,0,1,0.5,0.5]}}'  # word: a key of concept files
F, M = "unsupported_concept_format", "concept_malformed"
CORRUPT, LARGE, RANGE = "concept_corrupt", "concept_too_large", "concept_out_of_range"
# row, case -> (bytes, code, words)
REFUSED: dict[str, tuple[bytes, str, str]] = {
    "C1 pickle": (pickle.dumps(Pickled(Path("/nowhere"))), F, "Pickle-based files"),
    "C1 old pickle": (b"(dp0\nS'a'\nI1\ns.", F, "Pickle-based files"),
    "C1 zip of torch": (zipped(["archive/data.pkl"]), F, "Pickle-based files"),
    "C1 another safetensors file": (io.serialize({"lora": torch.zeros(3)}, {}), F, "not a Minikin concept"),
    "C2 cut in the header": (VALID[:100], CORRUPT, "incomplete: its header declares"),
    "C2 cut in the body": (VALID[:-3], CORRUPT, "its tensors end at byte"),
    "C2 trailing": (VALID + b"x", CORRUPT, "its tensors end at byte"),
    "C2 short length": (joined(HEADER, BODY, len(HEADER.rstrip()) - 1), CORRUPT, "is not whole"),
    "C2 long length": (joined(HEADER, BODY, len(HEADER) + 4), CORRUPT, "is not whole"),
    "C2 no length": (joined(HEADER, BODY, 0), CORRUPT, "is not whole"),
    "C3 header": (struct.pack("<Q", 2**20) + b"{" + bytes(2**20), LARGE, "header claims"),
    "C3 tensors": (many_tensors(), LARGE, "more than 64"),
    "C3 file": (VALID + bytes(io.MAX_FILE), LARGE, "more than the"),
    "C3 depth": (with_metadata("delta", shape=[[[4]]]), LARGE, "nested more than 4 deep"),
    "C3 depth of 30,000": (deep(), LARGE, "nested more than 4 deep"),
    "C3 depth of a recipe": (meta(recipe='{"a":' * 400 + "1" + "}" * 400), LARGE, "nested more than 4 deep"),
    "C3 depth of points": (meta(points="[" * 900 + "]" * 900), LARGE, "nested more than 4 deep"),
    "C4 key twice": (twice(), M, "a key occurs twice"),
    "C4 leading blank": (joined(" " + HEADER, BODY), F, "not in the safetensors format"),
    "C4 hole": (changed(lambda h: h["word.0"].update(data_offsets=[END + 2, END + 4])), M, "lies at bytes"),
    "C4 overlap": (with_metadata("dual", data_offsets=[0, 12]), M, "lies at bytes"),
    "C3 word vectors": (large("word.0", (76, 8)), LARGE, "has the shape (76, 8)"),
    "C3 width of word vectors": (large("word.0", (1, 4_097)), LARGE, "has the shape (1, 4097)"),
    "C3 i_star": (large("i_star", (2_000_000,)), LARGE, "has the shape (2000000,)"),
    "C3 dual": (large("dual", (4_097,)), LARGE, "has the shape (4097,)"),
    "C3 scale": (large("scale", (1_001,)), LARGE, "has the shape (1001,)"),
    "C3 keys": (large("keys", (400_001,)), LARGE, "has the shape (400001,)"),
    "C3 layers that cancel": (meta(index='[["d0.0",2,1000000000],["d0.1",2,-999999999]]'), M, "1000 layers"),
    "C4 dtype": (with_metadata("delta", dtype="F64"), M, "has the type 'F64'"),
    "C4 zero size": (with_metadata("delta", shape=[2**60, 0]), M, "has the shape"),
    "C4 UTF-8": (joined(HEADER.encode().replace(b"tom", b"t\xff\xfe"), BODY), M, "not valid JSON"),
    "C4 half a character": (joined(HEADER.replace("cat", "\\ud800"), BODY), M, "not valid Unicode"),
    "C4 negative": (with_metadata("delta", data_offsets=[-4, 12]), M, "no valid place"),
    "C5 path": (renamed("../../etc/passwd"), "concept_unexpected_tensor", "a tensor is named"),
    "C5 NUL": (renamed("i_star\x00"), "concept_unexpected_tensor", "a tensor is named"),
    "C5 U-Net": (renamed("unet.conv_in.weight"), "concept_unexpected_tensor", "a tensor is named"),
    "C5 shared state": (renamed("c_inv"), "concept_unexpected_tensor", "unexpected tensors ['c_inv']"),
    "C7 NaN": (joined(HEADER, b"\xff\x7f" + BODY[2:]), "concept_non_finite", "NaN or Inf"),
    "C7 infinity": (joined(HEADER, b"\x00\x7c" + BODY[2:]), "concept_non_finite", "NaN or Inf"),
    "C7 norm": (joined(HEADER, b"\xff\x7b" + BODY[2:]), RANGE, "plausible"),
    "C7 gate": (meta(gate='{"beta":NaN,"tau":0.1}'), M, "NaN is no number"),
    "C7 gate open everywhere": (meta(gate='{"beta":-1e300,"tau":0.1}'), RANGE, "beta -1e+300"),
    "C7 gate that divides by 0": (meta(gate='{"beta":0.7,"tau":1e-300}'), RANGE, "tau 1e-300"),
    "C7 point that divides by 0": (meta(points=POINT % "1e-300"), M, "out of range"),
    "C8 markup for a name": (meta(name="<script>alert(1)</script>"), M, "cannot be a concept's name"),
    "C8 escape for a category": (meta(category="cat\x1b[31m"), M, "characters that no word has"),
    "C8 formula for a category": (meta(category="=1+1"), M, "characters that no word has"),
    "C8 10 MB": (meta(licence="x" * 10_000_000), LARGE, "header claims"),
    "C8 4 KiB and one": (meta(licence="x" * 4097), M, "is not a text of at most 4096"),
    "C8 preview": (changed(lambda h: h["__metadata__"].update({THUMB: "x" * 49_153})), M, "at most 49152"),
    "C8 keys": (changed(lambda h: h["__metadata__"].update({str(k): "" for k in range(65)})), M, "at most 64"),
    "C9 no name": (meta(name=""), M, "cannot be a concept's name"),
    "C9 many words": (meta(name="a b c"), M, "cannot be a concept's name"),
    "C12 zip with a path": (zipped(["../../evil.safetensors"]), F, "Pickle-based files"),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[Served]:
    with served(FakeEngine(), tmp_path_factory.mktemp("hostile") / "s") as s:
        yield s


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words_with_a_code(case: str) -> None:
    """The error, its code and its words; within 50 ms of this thread's own time, so that nobody can keep a
    server busy."""
    data, code, words = REFUSED[case]
    gc.disable()  # a collection of all that these tests hold would count as this thread's time
    try:
        began = time.thread_time()
        with pytest.raises(BadConceptFile) as e:
            concept_file.from_bytes(data, "tom.safetensors")
        took = time.thread_time() - began
    finally:
        gc.enable()
    assert took < 0.05
    assert (e.value.code, words in str(e.value)) == (code, True), str(e.value)
    assert "tom.safetensors" in str(e.value)


@pytest.mark.parametrize("case", [c for c in REFUSED if c.startswith("C3")])
def test_bombs_need_no_memory(case: str) -> None:
    data, _, _ = REFUSED[case]
    tracemalloc.start()
    with pytest.raises(BadConceptFile):
        concept_file.from_bytes(data)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 32 * 2**20


@pytest.mark.parametrize("case", REFUSED)
def test_the_server_refuses_and_goes_on(server: Served, case: str) -> None:
    data, code, words = REFUSED[case]
    status = {F: 415}.get(code, 413 if case == "C3 file" else 422)
    with server.client() as c:
        response = c.post("/api/concepts", files={"file": ("tom.safetensors", data)})
        assert response.status_code == status, response.text
        assert response.json()["error"]["code"] == code
        assert case == "C3 file" or words in response.json()["error"]["message"]
        assert c.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    "case", ["C1 pickle", "C2 cut in the body", "C4 key twice", "C7 NaN", "C12 zip with a path"]
)
def test_the_command_line_refuses_with_3(case: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    data, _, words = REFUSED[case]
    path = tmp_path / "tom.safetensors"
    path.write_bytes(data)
    code, _, response = command(monkeypatch, capsys, "concepts", "check", path)
    assert code == 3 and words in response and "Traceback" not in response


@pytest.mark.parametrize("suffix", [".safetensors", ".SafeTensors", ".pt", ".bin"])
def test_c1_no_pickle_is_ever_opened(suffix: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Whatever it is called: the folder that the pickle would make is not made. The control makes it."""
    response = tmp_path / "opened"
    path = tmp_path / f"tom{suffix}"
    path.write_bytes(pickle.dumps(Pickled(response)))
    for args in (("concepts", "check", path), ("concepts", "add", path),
                 ("concepts", "import", path, "--name", "tom", "--category", "cat"),
                 ("models", "add", path), ("paint", "a cat", "--base", path)):  # fmt: skip
        code, _, _ = command(monkeypatch, capsys, *args)
        assert code in (2, 3) and not response.exists(), args
    pickle.loads(path.read_bytes())
    assert response.exists()


def test_c3_what_is_no_ordinary_file(tmp_path: Path) -> None:
    """A pipe that nobody writes to, a device without end, a folder: refused at once, not waited for."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zero"):
        with pytest.raises(BadConceptFile, match=r"is no file|cannot be read"):
            concept_file.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(BadConceptFile, match="is no file"):
        read_embedding(tmp_path / "zero.safetensors", 1)


def test_c6_only_the_diagonal_loads(bases: dict[str, Base], tiny: Base, tmp_path: Path) -> None:
    """Four bases, four gated concepts: each fits its own and no other (K10)."""
    known_bases = {n: bases[n] for n in ("sd15", "sdxl")} | {"tiny": tiny}
    known_bases["sd21"] = Base(
        build_pipeline("sd21", tmp_path, seed=3)
    )  # with the same text encoder, a sibling
    for name, base in known_bases.items():
        width = base.layout.text_width
        concept = Concept(
            "tom", "cat", "gated", base.origin,
            tuple(torch.zeros(1, m.get_input_embeddings().embedding_dim) for m in base.text_encoders),
            torch.zeros(width), torch.zeros(width),
            {s.path: torch.zeros(s.width) for s in base.layout.layers},
        )  # fmt: skip
        for other, there in known_bases.items():
            if other == name:
                Studio(there).add(concept)
                continue
            with pytest.raises(BaseMismatch) as e:
                Studio(there).add(concept)
            assert (e.value.exit_code, e.value.code) == (4, "concept_base_mismatch") and "tom" in str(e.value)
            assert all(f"({b.fingerprint[:8]})" in str(e.value) for b in (base, there))


def test_c8_what_a_stranger_wrote_is_shown_as_plain_text(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Escape sequences, direction marks and invisible characters in texts that are shown are left out."""
    wild = "a\x1b[31mb\u202ec\u200bd\x07[bold]e"
    path = tmp_path / "tom.safetensors"
    path.write_bytes(meta(licence=wild, recipe=json.dumps({"note": wild, wild: [wild]})))
    matches = concept_file.load(path)
    plain = "a[31mbcd[bold]e"
    assert matches.origin.licence == plain and matches.recipe == {"note": plain, plain: [plain]}
    code, response, _ = command(monkeypatch, capsys, "concepts", "show", path)
    assert code == 0 and "[bold]e" in response and not set("\x1b\u202e\u200b\x07") & set(response)


def test_c3_c8_what_is_written_fits_what_is_read() -> None:
    """The longest and deepest that Minikin writes itself: 16 presets of points, a recipe of every field."""
    point = Point(1.3333, 0.1555, 7.5555, 0.2222, (0.1111, 0.9999), 0.5555, 0.5555, "j" * 80)
    concept = replace(
        concept_file.from_bytes(VALID), recipe=Teach(name="tom", category="cat").model_dump(),
        points={f"preset-{k}": dict.fromkeys(NAMES, point) for k in range(16)},
    )  # fmt: skip
    assert concept_file.from_bytes(concept_file.to_bytes(concept)).points == concept.points


def test_c9_no_concept_takes_a_word_of_the_language() -> None:
    """Concepts are written <name>: one called like a word changes no prompt that does not ask for it."""
    known_bases = {"a": "cat", "photo": "dog"}
    assert parse("a photo of a cat", known_bases).uses == ()
    assert len(parse("a photo of <a>", known_bases).uses) == 1


def test_c11_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    """1,000 loads while another thread truncates and restores the file: sound, or refused; never a crash.

    A mapped file would end the process here (SIGBUS).
    """
    path, stop, observed = tmp_path / "tom.safetensors", threading.Event(), set()
    path.write_bytes(VALID)

    def disturb() -> None:
        while not stop.is_set():
            os.truncate(path, 40)
            path.write_bytes(VALID)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(1000):
            try:
                concept_file.load(path)
                observed.add("sound")
            except BadConceptFile as e:
                observed.add(e.code)
    finally:
        stop.set()
        thread.join()
    assert len(observed) > 1, "nothing was disturbed"


def test_c12_nothing_is_unpacked() -> None:
    """No importer opens archives; only sources of training data and the art pack of the build read tars, and
    the converter of old weights, a process of its own, reads entries of a zip."""
    root = Path(concept_file.__file__).parents[1]
    may = {
        "models/loading/legacy_checkpoint.py",
        "distillation/sources.py",
        "tools/tiny_training/art.py",
        "tools/tiny_training/hard_negatives.py",
        "tiny/sprites.py",
        "server/archive.py",  # writes one
    }
    words = ("import zipfile", "from zipfile", "import tarfile", "unpack_archive")
    matches = {
        p.relative_to(root).as_posix() for p in root.rglob("*.py") if any(w in p.read_text() for w in words)
    }  # fmt: skip
    assert matches <= may and "distillation/sources.py" in matches


# ---- mutations ---------------------------------------------------------------------------------------


def test_ten_thousand_damaged_files() -> None:
    """BadConceptFile or a concept that is sound by every rule, which the safetensors library reads alike."""
    accepted, wrong = survey(10_000)
    assert not wrong, wrong
    assert 500 < accepted < 4_000  # a flipped bit of a value is no damage; more would mean tame mutations


@pytest.mark.soak
def test_two_million_damaged_files() -> None:
    assert survey(2_000_000, seed=2)[1] == []


def _without_a_place_check(name: str, entry: Any, refuse: Any) -> tuple[int, int]:
    start, stop = entry["data_offsets"]
    return start, stop


def _last_key_wins(raw: bytes, refuse: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(raw))
    except ValueError:
        raise refuse("not JSON") from None


PLANTED: dict[str, tuple[Any, str, Any]] = {
    "offsets as they come": (io, "_offsets", _without_a_place_check),
    "keys twice": (io, "_header", _last_key_wins),
    "any number": (torch, "isfinite", lambda t: torch.ones(1, dtype=torch.bool)),
    "texts as they come": (concept_file, "_printable", lambda value: value),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_the_mutations_find_planted_bugs(bug: str, monkeypatch: Any) -> None:
    """The positive control: each rule taken out of the parser is missed within 6,000 files."""
    where, name, value = PLANTED[bug]
    monkeypatch.setattr(where, name, value)
    assert survey(6_000)[1] != []


# ---- the fuzz targets' corpus ------------------------------------------------------------------------

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_of_the_fuzz_targets(target: str) -> None:
    files = sorted((CORPUS / target).iterdir())
    assert len(files) >= 8
    for path in files:
        TARGETS[target](path.read_bytes())


def test_the_fuzz_target_can_fail(monkeypatch: Any) -> None:
    monkeypatch.setattr(io, "_offsets", _without_a_place_check)
    with pytest.raises((KeyError, TypeError, ValueError)):
        TARGETS["concept_file"]((CORPUS / "concept_file" / "no-place").read_bytes())


def test_saving_and_loading_is_whole_after_all_that() -> None:
    concept = concept_file.from_bytes(VALID)
    assert concept_file.to_bytes(replace(concept)) == VALID


def test_the_cache_of_concepts_is_bounded_in_bytes(tmp_path: Path, monkeypatch: Any) -> None:
    """The largest concepts that are accepted do not add up: those used longest ago are forgotten."""
    from minikin.server import concept_store

    size = concept_file.from_bytes(VALID).memory_bytes
    monkeypatch.setattr(concept_store, "MAX_PARSED_BYTES", 3 * size + 100)
    with served(FakeEngine(), tmp_path / "s") as s:
        store = s.service.concept_store
        for k in range(6):
            entry = store.put("me", meta(name=f"tom{k}"), check_quota=False)
            store.pinned(entry.name, entry)
            if k == 2:
                store.pinned("tom0", store.find("me", "tom0"))  # used again: it stays longer
        names_kept = [c.name for c in store._parsed.values()]
        assert len(names_kept) == 3 and sum(c.memory_bytes for c in store._parsed.values()) <= 3 * size + 100
        assert names_kept == ["tom3", "tom4", "tom5"]
