"""What every stage is given, and the small things all of them do with it."""

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
from minikin.training.plan import Plan

TRAINED = ("autoencoder", "text", "unet", "adapters", "judge", "classifier")


@dataclass(frozen=True)
class Job:
    """One build.

    out      everything is written below it: a folder for every stage
    device   where the networks are trained; "cpu", "cuda", ...
    workers  processes that render; 0 renders in this one
    art      another art pack than the package's
    source   a diffusers folder to go on from instead of training from nothing
    split    largest file of the exported weights in MB
    minutes, steps  other budgets than the recipe's, by stage; with `source`, the stages that have one
             (and the U-Net) are trained further, the others are taken as they are
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

    def plan(self, stage: str, default: Plan, share: float = 1.0) -> Plan:
        """The recipe's plan with the budget that was asked for, or `share` of it."""
        m, n = self.minutes.get(stage), self.steps.get(stage)
        if m is None and n is None:
            return default
        return default.model_copy(
            update={"minutes": m and share * m, "steps": n and max(1, round(share * n))}
        )  # fmt: skip

    def folder(self, stage: str) -> Path:
        return self.out / stage

    def need(self, path: Path, stage: str) -> Path:
        """`path`, made by another stage. Raises BadRecipe when it is not there."""
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
        """Whether the stage's part is taken from `source` as it is."""
        return self.source is not None and stage not in {*self.minutes, *self.steps}


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names; 16 hexadecimal digits."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode())
        with open(file, "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()[:16]


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Inside, libraries write to `path`; what the disk refuses becomes a StorageError."""
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
    """`part.save_pretrained(path)`, whole or not at all; raises StorageError."""
    with atomic_folder(path) as fresh, storing(path):
        part.save_pretrained(fresh, **options)
        for file in fresh.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes files that nobody else can read
        for file in fresh.rglob("tokenizer.json"):  # half of it as it comes is indentation
            read = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps(read, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def adopt(job: Job, part: str, path: Path) -> str:
    """Copy a part of `source` to where its stage would write it; what was done, in words."""
    import shutil

    source = job.adopted(part)
    if path.exists():
        return f"{path} is kept" + (
            "" if digest(path) == digest(source) else f"; it is not that of {job.source}"
        )
    with atomic_folder(path) as fresh, storing(path):
        shutil.copytree(source, fresh, dirs_exist_ok=True)
    return f"{part} taken from {job.source}"
