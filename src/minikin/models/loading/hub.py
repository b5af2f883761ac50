"""Downloading published models: size and licence first, resumable, every file checked.

The only place of Minikin that talks to a model hub, and only when `models pull` asks it to. The
endpoint is $HF_ENDPOINT or the Hugging Face hub; tests run against a stand-in on this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from minikin import events
from minikin.errors import BadModelFile, NoNetwork, StorageError, UnknownName
from minikin.files import move_into_place
from minikin.models import presets
from minikin.models.loading.registry import KNOWN, add, models_folder
from minikin.models.lora import adapters
from minikin.models.presets import Source

CHUNK = 1 << 20
TIMEOUT_S = 30
_PARTS = (
    "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "",
)  # fmt: skip


@dataclass(frozen=True)
class Helper:
    """A published model that is no base: its weights lie at the top of a repository, or in one part of it."""

    repo: str
    licence: str
    part: str = ""


HELPERS = {
    "clipseg": Helper("CIDAS/clipseg-rd64-refined", "Apache-2.0"),
    "clip-b32": Helper("openai/clip-vit-base-patch32", "MIT"),
    "clip-l14": Helper("openai/clip-vit-large-patch14", "MIT"),
    "dino-s16": Helper("facebook/dino-vits16", "Apache-2.0"),
    "dinov2-s14": Helper("facebook/dinov2-small", "Apache-2.0"),
    "safety-checker": Helper(KNOWN["sd15"].repo, KNOWN["sd15"].licence, "safety_checker"),
}


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository: its size and, for large files, its SHA-256."""

    name: str
    size: int
    sha256: str = ""


@dataclass(frozen=True)
class Plan:
    """What a pull would fetch."""

    name: str
    repo: str
    licence: str
    revision: str
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        return sum(f.size for f in self.files)


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def plan(name: str, revision: str | None = None) -> Plan:
    """Ask the hub what a known model (or owner/name) consists of.

    revision  a commit, tag, branch or refs/pr/N; the newest commit by default
    Raises UnknownName, NoNetwork, or BadModelFile when the repository has no safetensors weights.
    """
    sources = presets.sources()
    if name in sources:
        return _adapter_plan(sources[name], revision)
    if name not in KNOWN and name not in HELPERS and name.count("/") != 1:
        raise UnknownName("model", name, [*KNOWN, *HELPERS, *sources], "A hub id (owner/name) works too.")
    known, helper = KNOWN.get(name), HELPERS.get(name)
    source = known or helper
    repo = source.repo if source else name
    facts, files, stated = _ask(repo, revision)
    licence = source.licence if source else stated
    wanted = tuple(_wanted(files, helper))
    if not any(f.name.endswith(".safetensors") for f in wanted):
        raise BadModelFile(_only_pickles(name, repo, files, helper))
    return Plan(name, repo, licence, _revision(facts, repo), wanted)


def _ask(repo: str, revision: str | None) -> tuple[dict[str, Any], list[RemoteFile], str]:
    """What the hub says of a repository: everything, its files, the licence on its card."""
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    facts = json.loads(_get(f"{endpoint()}/api/models/{repo}{at}?blobs=true", repo))
    files = [
        RemoteFile(s["rfilename"], int(s.get("size") or 0), (s.get("lfs") or {}).get("sha256", ""))
        for s in facts.get("siblings", [])
    ]
    return facts, files, str((facts.get("cardData") or {}).get("license", "unknown"))


def _revision(facts: dict[str, Any], repo: str) -> str:
    """The commit that all files are taken of: a branch may move between two of them."""
    found = str(facts.get("sha") or "")
    if not re.fullmatch(r"[0-9a-f]{6,64}", found):
        raise BadModelFile(f"The hub does not say which commit of {repo} this is, so it is not fetched.")
    return found


def _adapter_plan(source: Source, revision: str | None) -> Plan:
    """One file of a repository: a preset's adapter."""
    facts, files, stated = _ask(source.repo, revision)
    wanted = tuple(f for f in files if f.name == source.file)
    if not wanted:
        raise BadModelFile(f"{source.repo} has no file {source.file} any more. Look for it on its page.")
    return Plan(source.name, source.repo, source.licence or stated, _revision(facts, source.repo), wanted)


def _only_pickles(name: str, repo: str, files: list[RemoteFile], helper: Helper | None) -> str:
    layout = "" if helper else " in diffusers layout"
    told = f"{repo} has no .safetensors weights{layout}; pickles are not fetched."
    weights = [f.name for f in files if f.name.endswith("pytorch_model.bin")]
    if not helper or not weights:
        return told
    folder = models_folder() / name
    return (
        f"{told} A pull request on its page may add them: --revision refs/pr/NUMBER. Or, if you trust who "
        "published it, fetch it yourself and convert it, which executes nothing of it: "
        f"`hf download {repo} --local-dir {folder}`, then `minikin models convert {folder / weights[0]}`."
    )


def _wanted(files: list[RemoteFile], helper: Helper | None = None) -> Iterator[RemoteFile]:
    """Configurations, tokenizers, and one set of safetensors weights per part (half if there is one).

    helper  a single model, not a pipeline
    """
    flat = helper is not None and not helper.part
    parts = (helper.part,) if helper and helper.part else _PARTS
    names = {f.name for f in files}
    for f in files:
        path = PurePosixPath(f.name)
        if ".." in path.parts or path.is_absolute():
            continue
        part = "" if len(path.parts) == 1 else path.parts[0]
        if part not in parts or len(path.parts) > 2:
            continue
        if path.suffix in (".json", ".txt"):
            yield f
        elif path.suffix == ".safetensors" and bool(part) != flat and "non_ema" not in f.name:
            half = f.name.replace(".safetensors", ".fp16.safetensors")
            if f.name.endswith(".fp16.safetensors") or half not in names:
                yield f


def pull(p: Plan) -> Iterator[events.Event]:
    """Fetch every file of a plan, resuming what is half there; the last event is Done(Entry)."""
    is_adapter = p.name in presets.sources()
    folder = adapters.folder() if is_adapter else models_folder() / p.name.replace("/", "--")
    total, before = p.size, 0
    for f in p.files:
        file = f"{p.name}.safetensors" if is_adapter else f.name
        target = folder / file.replace(".fp16.safetensors", ".safetensors")
        if not (target.is_file() and target.stat().st_size == f.size and _is_right(target, f)):
            for got in _fetch(p, f, target):
                yield events.Progress("download", (before + got) >> 20, max(total >> 20, 1), f.name)
        before += f.size
    if p.name in HELPERS or is_adapter:
        yield events.Done(None, {"bytes": total, "folder": str(folder)})
        return
    name = p.name.replace("/", "--") if "/" in p.name else f"{p.name}-local"
    entry = add(folder, name, licence=p.licence)
    yield events.Done(entry, {"bytes": total, "folder": str(folder)})


def _fetch(p: Plan, f: RemoteFile, target: Path) -> Iterator[int]:
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.exists() else 0
        if done > f.size:
            part.unlink()
            done = 0
        if done < f.size or f.size == 0:
            url = f"{endpoint()}/{p.repo}/resolve/{p.revision}/{f.name}"
            with _open(url, p.repo, done) as answer, open(part, "ab" if answer.status == 206 else "wb") as out:
                done = done if answer.status == 206 else 0
                while chunk := answer.read(CHUNK):
                    out.write(chunk)
                    done += len(chunk)
                    yield done
                out.flush()
                os.fsync(out.fileno())
    except urllib.error.URLError as e:
        raise NoNetwork(_offline(p.repo, e)) from e
    except (TimeoutError, ConnectionError) as e:
        raise NoNetwork(
            f"{_offline(p.repo, e)} What has arrived is kept; run the same command to go on."
        ) from e
    except OSError as e:
        raise StorageError(f"{part} cannot be written: {e.strerror or e}. What has arrived is kept.") from e
    if part.stat().st_size != f.size:
        raise NoNetwork(
            f"The connection ended after {part.stat().st_size} of {f.size} bytes of {f.name}. What has arrived "
            "is kept; run the same command to go on."
        )
    if not _is_right(part, f):
        part.unlink()
        raise BadModelFile(
            f"{f.name} arrived damaged (its SHA-256 is not the one the hub states) and was removed. "
            "Run the same command to fetch it again."
        )
    move_into_place(part, target)


def _is_right(path: Path, f: RemoteFile) -> bool:
    if not f.sha256:
        return True
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == f.sha256


def _open(url: str, repo: str, start: int = 0) -> Any:
    headers = {"User-Agent": "minikin"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    if token := os.environ.get("HF_TOKEN"):  # for the hub alone, not for where it redirects to
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as e:
        if e.code in (401, 403):
            raise NoNetwork(
                f"{repo} asks for an account: accept its licence on its page, then set HF_TOKEN."
            ) from e
        raise NoNetwork(f"{endpoint()} answered {e.code} for {repo}. Is the name right?") from e


def _get(url: str, repo: str) -> bytes:
    try:
        with _open(url, repo) as answer:
            data: bytes = answer.read()
            return data
    except (urllib.error.URLError, TimeoutError, ConnectionError) as e:
        raise NoNetwork(_offline(repo, e)) from e


def _offline(repo: str, e: Exception) -> str:
    why = getattr(e, "reason", e)
    return (
        f"{repo} cannot be fetched: no connection to {endpoint()} ({why}). Without a network, add a file "
        "you have: minikin models add FILE. The embedded base `tiny` works offline."
    )
