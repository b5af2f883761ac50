"""Downloads of published models: `minikin models pull`.

`plan` asks the hub for size, licence and files; `pull` downloads them, resumes partial files and checks their
SHA-256. This is the only module that accesses a model hub: $HF_ENDPOINT, or by default the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from minikin import events, strict_json
from minikin.errors import BadModelFile, NoNetwork, StorageError, UnknownName
from minikin.files import move_into_place
from minikin.models import presets
from minikin.models.loading.diffusers_folder import HALF_PRECISIONS, precision
from minikin.models.loading.registry import PUBLISHED, add, models_folder
from minikin.models.lora import adapters
from minikin.models.presets import Source

CHUNK = 1 << 20
TIMEOUT_S = 30
MAX_ANSWER = 64 << 20  # bytes of a description; some repositories list 10,000 files
_PARTS = (
    "unet", "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "",
)  # fmt: skip
_VOCABULARIES = ("spiece.model", "tokenizer.model")  # of SentencePiece


@dataclass(frozen=True)
class AuxiliaryModel:
    """A published model that is no base: its files are at the top of a repository, or in the folder `part`."""

    repo: str
    licence: str
    part: str = ""


AUXILIARY_MODELS = {
    "clipseg": AuxiliaryModel("CIDAS/clipseg-rd64-refined", "Apache-2.0"),
    "clip-b32": AuxiliaryModel("openai/clip-vit-base-patch32", "MIT"),
    "clip-l14": AuxiliaryModel("openai/clip-vit-large-patch14", "MIT"),
    "dino-s16": AuxiliaryModel("facebook/dino-vits16", "Apache-2.0"),
    "dinov2-s14": AuxiliaryModel("facebook/dinov2-small", "Apache-2.0"),
    "safety-checker": AuxiliaryModel(PUBLISHED["sd15"].repo, PUBLISHED["sd15"].licence, "safety_checker"),
}


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository: its size and, for large files, its SHA-256."""

    name: str
    size: int
    sha256: str = ""


@dataclass(frozen=True)
class Plan:
    """The files that a pull downloads, with their licence and commit."""

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
    """The files of a published model (or owner/name), as the hub lists them.

    revision  a commit, tag, branch or refs/pr/N; by default the newest commit
    Raises UnknownName, NoNetwork, or BadModelFile if the repository has no safetensors weights.
    """
    sources = presets.sources()
    if name in sources:
        return _adapter_plan(sources[name], revision)
    if name not in PUBLISHED and name not in AUXILIARY_MODELS and name.count("/") != 1:
        raise UnknownName(
            "model", name, [*PUBLISHED, *AUXILIARY_MODELS, *sources], "A hub id (owner/name) works too."
        )
    auxiliary = AUXILIARY_MODELS.get(name)
    source = PUBLISHED.get(name) or auxiliary
    repo = source.repo if source else name
    info, files, stated_licence = _repository(repo, revision)
    licence = source.licence if source else stated_licence
    needed = tuple(_needed_files(files, auxiliary))
    if not any(f.name.endswith(".safetensors") for f in needed):
        raise BadModelFile(_only_pickles(name, repo, files, auxiliary))
    return Plan(name, repo, licence, _commit(info, repo), needed)


def _repository(repo: str, revision: str | None) -> tuple[dict[str, Any], list[RemoteFile], str]:
    """The hub's description of a repository, its files, and the licence on its model card."""
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    answer = _get(f"{endpoint()}/api/models/{repo}{at}?blobs=true", repo)
    try:
        info = strict_json.loads(answer, kind=dict, max_bytes=MAX_ANSWER, max_values=MAX_ANSWER // 20)
    except strict_json.BadJson as e:
        raise NoNetwork(f"The hub's answer about {repo} is not sound JSON: {e}. Try again later.") from None
    files = [
        RemoteFile(s["rfilename"], int(s.get("size") or 0), (s.get("lfs") or {}).get("sha256", ""))
        for s in info.get("siblings", [])
    ]
    return info, files, str((info.get("cardData") or {}).get("license", "unknown"))


def _commit(info: dict[str, Any], repo: str) -> str:
    """The commit to download all files from, because a branch may move during the download."""
    sha = str(info.get("sha") or "")
    if not re.fullmatch(r"[0-9a-f]{6,64}", sha):
        raise BadModelFile(f"The hub does not say which commit of {repo} this is, so it is not fetched.")
    return sha


def _adapter_plan(source: Source, revision: str | None) -> Plan:
    """The plan for a preset's adapter, which is one file of a repository."""
    info, files, stated_licence = _repository(source.repo, revision)
    needed = tuple(f for f in files if f.name == source.file)
    if not needed:
        raise BadModelFile(f"{source.repo} has no file {source.file} any more. Look for it on its page.")
    licence = source.licence or stated_licence
    return Plan(source.name, source.repo, licence, _commit(info, source.repo), needed)


def _only_pickles(name: str, repo: str, files: list[RemoteFile], auxiliary: AuxiliaryModel | None) -> str:
    layout = "" if auxiliary else " in diffusers layout"
    message = f"{repo} has no .safetensors weights{layout}; pickles are not fetched."
    weights = [f.name for f in files if f.name.endswith("pytorch_model.bin")]
    if not auxiliary or not weights:
        return message
    folder = models_folder() / name
    return (
        f"{message} A pull request on its page may add them: --revision refs/pr/NUMBER. Or, if you trust who "
        "published it, fetch it yourself and convert it, which executes nothing of it: "
        f"`hf download {repo} --local-dir {folder}`, then `minikin models convert {folder / weights[0]}`."
    )


def _needed_files(files: list[RemoteFile], auxiliary: AuxiliaryModel | None = None) -> Iterator[RemoteFile]:
    """Configurations, tokenizers, and the safetensors files of each part, in half precision if there are any.

    auxiliary  set for a single model, None for a pipeline
    """
    flat = auxiliary is not None and not auxiliary.part
    parts = (auxiliary.part,) if auxiliary and auxiliary.part else _PARTS
    halves = [(_folder(f), precision(f.name)) for f in files if f.name.endswith(".safetensors")]
    for f in files:
        path = PurePosixPath(f.name)
        if ".." in path.parts or path.is_absolute():
            continue
        part = _folder(f)
        if part not in parts or len(path.parts) > 2:
            continue
        if ".safetensors" in path.name and precision(path.name) != _half_precision(part, halves):
            continue
        is_weights = path.suffix == ".safetensors" and bool(part) != flat and "non_ema" not in f.name
        if is_weights or path.suffix in (".json", ".txt") or path.name in _VOCABULARIES:
            yield f


def _folder(f: RemoteFile) -> str:
    """The component that a file belongs to; "" at the top of the repository."""
    return f.name.partition("/")[0] if "/" in f.name else ""


def _half_precision(part: str, files: list[tuple[str, str]]) -> str:
    """fp16 or bf16, where a component has weights of it; else ""."""
    return next((half for half in HALF_PRECISIONS if (part, half) in files), "")


def pull(p: Plan) -> Iterator[events.Event]:
    """Download the files of a plan, resuming partial ones; the last event is Done(Entry)."""
    is_adapter = p.name in presets.sources()
    folder = adapters.folder() if is_adapter else models_folder() / p.name.replace("/", "--")
    total, before = p.size, 0
    for f in p.files:
        file = f"{p.name}.safetensors" if is_adapter else f.name
        target = folder / re.sub(rf"\.({'|'.join(HALF_PRECISIONS)})\.safetensors$", ".safetensors", file)
        if not (target.is_file() and target.stat().st_size == f.size and _hash_matches(target, f)):
            for received in _download(p, f, target):
                yield events.Progress("download", (before + received) >> 20, max(total >> 20, 1), f.name)
        before += f.size
    if p.name in AUXILIARY_MODELS or is_adapter:
        yield events.Done(None, {"bytes": total, "folder": str(folder)})
        return
    name = p.name.replace("/", "--") if "/" in p.name else f"{p.name}-local"
    entry = add(folder, name, licence=p.licence)
    yield events.Done(entry, {"bytes": total, "folder": str(folder)})


def _download(p: Plan, f: RemoteFile, target: Path) -> Iterator[int]:
    """Download one file into TARGET.part, check it and move it into place; yields the bytes received so far."""
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
    if not _hash_matches(part, f):
        part.unlink()
        raise BadModelFile(
            f"{f.name} arrived damaged (its SHA-256 is not the one the hub states) and was removed. "
            "Run the same command to fetch it again."
        )
    move_into_place(part, target)


def _hash_matches(path: Path, f: RemoteFile) -> bool:
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
    if token := os.environ.get("HF_TOKEN"):  # not sent to hosts that the hub redirects to
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
