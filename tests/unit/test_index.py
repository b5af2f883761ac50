"""The index of many concepts agrees with the files, whatever happened to them or to it."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from minikin.errors import UnknownName
from minikin.perfusion import index as indexing
from minikin.perfusion import library
from minikin.perfusion.index import Index
from tests.conftest import command
from tests.helpers.servers import concept


def put(folder: Path, name: str, category: str = "cat", ago: float = 60.0) -> Path:
    """Write a concept file into a folder whose modification time is `ago` seconds back."""
    path = folder / f"{name}.safetensors"
    path.write_bytes(concept(name, sum(name.encode()), category))
    set_age(folder, ago)
    return path


def set_age(folder: Path, ago: float = 60.0) -> None:
    at = time.time_ns() - int(ago * 1e9) + set_age.n  # type: ignore[attr-defined]
    set_age.n += 1  # type: ignore[attr-defined]
    os.utime(folder, ns=(at, at))


set_age.n = 0  # type: ignore[attr-defined]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "many"
    path.mkdir()
    for k in range(12):
        put(path, f"pet{k:02}", "cat" if k % 3 else "teddy bear")
    (path / "lora.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (path / "notes.txt").write_text("x")
    set_age(path)
    return path


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path / "index.sqlite")


def names(index: Index, folder: Path, *args: Any, **kwargs: Any) -> list[str]:
    return [entry.name for entry in index.search(folder, *args, **kwargs)]


def test_listing_and_searching(index: Index, folder: Path) -> None:
    assert names(index, folder) == [f"pet{k:02}" for k in range(12)]
    assert names(index, folder, "T0", limit=2, offset=1) == ["pet01", "pet02"]
    assert names(index, folder, category="teddy bear") == ["pet00", "pet03", "pet06", "pet09"]
    assert index.count(folder, "1", category="cat") == 3  # 01, 10, 11
    assert index.categories(folder) == {"cat": 8, "teddy bear": 4}
    entry = index.search(folder, "pet03")[0]
    assert entry.path.is_file() and (entry.architecture, entry.bytes) == ("tiny", entry.path.stat().st_size)
    assert names(index, folder, "%") == names(index, folder, "'") == []


def test_it_follows_the_files(index: Index, folder: Path) -> None:
    """Added, removed, replaced, renamed; and a folder that is not there."""
    names(index, folder)
    put(folder, "new", "dog")
    assert "new" in names(index, folder)
    (folder / "pet00.safetensors").unlink()
    (folder / "pet01.safetensors").rename(folder / "other.safetensors")
    put(folder, "pet02", "boat")
    assert {"pet00", "pet01"}.isdisjoint(names(index, folder)) and "other" in names(index, folder)
    assert names(index, folder, category="boat") == ["pet02"]
    assert names(index, folder / "nowhere") == []


def test_only_what_changed_is_opened(index: Index, folder: Path, monkeypatch: Any) -> None:
    opened: list[str] = []
    read_header = indexing._header_metadata
    monkeypatch.setattr(indexing, "_header_metadata", lambda p: opened.append(Path(p).stem) or read_header(p))
    names(index, folder)
    assert len(opened) == 13
    names(index, folder)
    put(folder, "new")
    names(index, folder)
    assert opened[13:] == ["new"]


def test_a_recently_changed_folder_is_scanned_again(index: Index, folder: Path) -> None:
    """Two changes within one tick of the file system's clock: the second is seen, too."""
    now = time.time_ns()
    os.utime(folder, ns=(now, now))
    names(index, folder)
    (folder / "late.safetensors").write_bytes(concept("late", 1))
    os.utime(folder, ns=(now, now))
    assert "late" in names(index, folder)


def test_old_changes_within_a_tick_are_the_limit(index: Index, folder: Path) -> None:
    """The control: with an old stamp that stays the same, nothing is looked at."""
    names(index, folder)
    stamp = folder.stat().st_mtime_ns
    (folder / "late.safetensors").write_bytes(concept("late", 1))
    os.utime(folder, ns=(stamp, stamp))
    assert "late" not in names(index, folder)


def test_hashes_are_of_the_files_as_they_are(index: Index, folder: Path, monkeypatch: Any) -> None:
    """Computed when they are asked for, once; a file that was changed in place has its new one."""
    read: list[str] = []
    read_header = indexing._header_metadata
    monkeypatch.setattr(indexing, "_header_metadata", lambda p: read.append(Path(p).stem) or read_header(p))
    assert index.search(folder)[0].sha256 == ""
    entries = index.search(folder, "1", hashed=True)
    hashes = [hashlib.sha256(entry.path.read_bytes()).hexdigest() for entry in entries]
    assert [entry.sha256 for entry in entries] == hashes
    read.clear()
    entries[0].path.write_bytes(concept("other", 99, "boat"))
    again = index.search(folder, "1", hashed=True)
    assert read == [entries[0].name] and again[1:] == entries[1:]
    assert again[0].sha256 == hashlib.sha256(concept("other", 99, "boat")).hexdigest()
    assert again[0].category == "boat"


@pytest.mark.parametrize("damage", ["noise", "cut", "other", "newer", "read-only"])
def test_a_damaged_index_is_rebuilt(index: Index, folder: Path, damage: str, tmp_path: Path) -> None:
    import sqlite3

    whole = names(index, folder)
    data = index.path.read_bytes()
    if damage == "noise":
        index.path.write_bytes(b"\xff" * len(data))
    elif damage == "cut":
        index.path.write_bytes(data[: len(data) // 2])
    elif damage == "other":
        index.path.unlink()
        with sqlite3.connect(index.path) as db:
            db.execute(f"PRAGMA user_version={indexing.VERSION}")
    elif damage == "newer":
        with sqlite3.connect(index.path) as db:
            db.execute("PRAGMA user_version=99")
    else:
        index.path = Path("/proc/nowhere/index.sqlite")
    assert names(index, folder) == whole


def test_a_large_library_by_name(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Beyond MANY files: the same answers, and a concept is found without looking at the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(library, "MANY", 5)
    home = library.library_folder()
    home.mkdir(parents=True)
    for k in range(8):
        put(home, f"pet{k}", "dog" if k == 3 else "cat")
    put(tmp_path, "pet3", "boat")  # the current folder wins
    assert library.names()["pet3"] == tmp_path / "pet3.safetensors" and len(library.names()) == 8
    assert library.find("pet3").category == "boat" and library.resolve("pet4").parent == home
    assert [entry.name for entry in library.search(category="cat", limit=2)] == ["pet0", "pet1"]
    with pytest.raises(UnknownName, match=r"Unknown concept 'pet9'. Did you mean 'pet"):
        library.find("pet9")
    code, out, _ = command(monkeypatch, capsys, "concepts", "list", "--search", "pet", "--limit", 3)
    assert code == 0 and out.count("bytes") == 3 and "and 6 more" in out
    code, out, _ = command(monkeypatch, capsys, "concepts", "list", "--category", "boat")
    assert out.count("bytes") == 1 and "more" not in out


def test_the_server_lists_two_thousand_without_opening_them(tmp_path: Path, monkeypatch: Any) -> None:
    """Once by the index; then listing, naming by name and by hash open no file but the one that is named."""
    from minikin.server import concept_store
    from tests.helpers.fake_engine import FakeEngine
    from tests.helpers.servers import served

    home = library.library_folder()
    home.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for k in range(20):
        put(home, f"first{k}", "dog" if k % 2 else "cat")
    for k in range(1980):  # links: to the index each is a file of its own
        os.link(home / f"first{k % 20}.safetensors", home / f"pet{k:04}.safetensors")
    set_age(home)
    with served(FakeEngine(), tmp_path / "s") as s, s.client() as c:
        assert c.get("/api/concepts").json()["total"] == 2000
        opened: list[str] = []
        parse = concept_store._parsed
        monkeypatch.setattr(concept_store, "_parsed", lambda d, what: opened.append(what) or parse(d, what))
        monkeypatch.setattr(indexing, "_header_metadata", lambda p: opened.append(p))
        params = {"search": "T19", "category": "dog", "limit": 3, "offset": 1}
        page = c.get("/api/concepts", params=params).json()
        assert [entry["name"] for entry in page["concepts"]] == ["pet1901", "pet1903", "pet1905"]
        assert page["total"] == 41
        assert not opened
        assert not list((tmp_path / "s" / "concepts").iterdir()), "listing copies nothing"
        sha = page["concepts"][0]["sha256"]
        result = c.post("/api/paint?wait=true", json={"prompt": "<pet0007>"}).json()["results"][0]
        assert opened == ["concept 'pet0007'"] and c.get(result["url"]).status_code == 200
        assert hashlib.sha256(c.get(f"/api/concepts/sha256:{sha}").content).hexdigest() == sha
        answer = c.post("/api/paint", json={"prompt": "<pet00077>"})
        assert answer.status_code == 422 and "Did you mean 'pet00" in answer.text
        assert len(c.get("/sdapi/v1/embeddings").json()["loaded"]) == 2000
