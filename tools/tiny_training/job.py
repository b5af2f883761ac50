"""A build of the embedded model: recipe, folders and budgets, and helpers of all stages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.tiny_training.recipes import Build

from minikin.errors import BadModelFile, BadRecipe, StorageError, UnknownName
from minikin.files import atomic_folder
from minikin.training.config import TrainingConfig

TRAINED = ("autoencoder", "text", "unet", "adapters", "dual-encoder", "classifier")
# stages and folders of version 0.1
_FORMER = "pictures pictures-held lookalikes judge".split()  # word: names of 0.1
_NAMES = ("images", "images-held", "hard-negatives", "dual-encoder")
FORMER_NAMES = dict(zip(_FORMER, _NAMES, strict=True))


def canonical(stage: str) -> str:
    """The present name of a stage; names of version 0.1 are understood, too."""
    return FORMER_NAMES.get(stage, stage)


@dataclass(frozen=True)
class Job:
    """One build.

    out      folder of all files, with a folder for every stage
    device   device of the training: "cpu", "cuda", ...
    workers  processes that render; 0 renders in this one
    art      path of an art pack other than the package's
    source   diffusers folder whose weights are trained further, instead of training from nothing
    split    largest file of the exported weights in MB
    minutes, steps  budgets by stage in place of the recipe's; with `source`, the U-Net and the stages with
             a budget are trained further, the other parts are copied
    Raises UnknownName for the budget of a stage that is not trained, BadRecipe for a budget of nothing.
    """

    recipe: Build
    out: Path
    device: str = "cpu"
    workers: int = 0
    art: Path | None = None
    source: Path | None = None
    split: float | None = None
    minutes: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.minutes, *self.steps):
            if name not in TRAINED:
                raise UnknownName("trained stage", name, TRAINED)
            if name in self.minutes and name in self.steps:
                raise BadRecipe(f"Stage {name} has a budget in minutes and one in steps; give one of them.")
            if self.minutes.get(name, 1) <= 0 or self.steps.get(name, 1) < 1:
                raise BadRecipe(f"The budget of stage {name} must be positive.")

    def plan(self, stage: str, default: TrainingConfig) -> TrainingConfig:
        """The recipe's training config with this build's budget for the stage, if it has one."""
        m, n = self.minutes.get(stage), self.steps.get(stage)
        if m is None and n is None:
            return default
        return default.model_copy(update={"minutes": m, "steps": n})

    def folder(self, stage: str) -> Path:
        return self.out / stage

    def need(self, path: Path, stage: str) -> Path:
        """`path`, which another stage writes. Raises BadRecipe when it does not exist."""
        if not path.exists():
            raise BadRecipe(f"{path} is missing: it is made by stage {stage}. Run --stage {stage} first.")
        return path

    @property
    def vae(self) -> Path:
        return self.folder("autoencoder") / "vae"

    @property
    def tokenizer(self) -> Path:
        return self.folder("tokenizer") / "tokenizer"

    @property
    def text_encoder(self) -> Path:
        return self.folder("text") / "text_encoder"

    @property
    def unet(self) -> Path:
        return self.folder("unet") / "unet"

    @property
    def model(self) -> Path:
        """The exported diffusers folder."""
        return self.out / "model"

    def adopted(self, part: str) -> Path:
        """The folder of a part ("vae", "unet", ...) in `source`. Raises BadModelFile."""
        assert self.source is not None
        path = self.source / part
        if not path.is_dir():
            raise BadModelFile(
                f"{self.source} has no folder '{part}'. --from wants a diffusers folder such as the one "
                "stage export writes: model_index.json, unet, vae, text_encoder, tokenizer, scheduler."
            )
        return path

    def takes(self, stage: str) -> bool:
        """True when the stage's part is copied from `source`."""
        return self.source is not None and stage not in {*self.minutes, *self.steps}


def digest(path: Path) -> str:
    """SHA-256 of a file, or of names and contents of a folder's files; 16 hexadecimal digits."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode())
        with open(file, "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()[:16]


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Context for libraries that write to `path`: their errors become a StorageError."""
    from safetensors import SafetensorError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as e:
        why = getattr(e, "strerror", None) or e
        raise StorageError(
            f"{path} was not written: {why}. Free some space or choose another --out, and run the same command "
            "again; finished stages and checkpoints are kept."
        ) from e


def save_part(part: Any, path: Path, **options: Any) -> None:
    """`part.save_pretrained(path)`, atomically. Raises StorageError."""
    with atomic_folder(path) as fresh, storing(path):
        part.save_pretrained(fresh, **options)
        for file in fresh.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes files that other users cannot read
        for file in fresh.rglob("tokenizer.json"):  # half of the file is indentation
            content = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def adopt(job: Job, part: str, path: Path) -> str:
    """Copy a part of `source` to `path`, where its stage would write it; returns a message."""
    import shutil

    source = job.adopted(part)
    if path.exists():
        return f"{path} is kept" + (
            "" if digest(path) == digest(source) else f"; it is not that of {job.source}"
        )
    with atomic_folder(path) as fresh, storing(path):
        shutil.copytree(source, fresh, dirs_exist_ok=True)
    return f"{part} taken from {job.source}"
