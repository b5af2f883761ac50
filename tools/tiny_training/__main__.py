"""Command `python -m tools.tiny_training`: train the embedded model from nothing, or resume its training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from tools.tiny_training.errors import exit_on_error

Names = Annotated[list[str] | None, typer.Option("--stage", help="only these stages (repeat); all by default")]


def main(
    world: Annotated[str, typer.Option(help="small, rich or wide")] = "small",
    out: Annotated[Path | None, typer.Option(help="folder of the build \\[cache/tiny-WORLD-PRESET]")] = None,
    stage: Names = None,
    minutes: Annotated[list[str] | None, typer.Option(help="STAGE=M, a budget in minutes (repeat)")] = None,
    steps: Annotated[list[str] | None, typer.Option(help="STAGE=N, a budget in steps (repeat)")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    preset: Annotated[str | None, typer.Option(help="cpu or gpu; by the device when not given")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="diffusers folder to go on from, such as tiny's own weights")
    ] = None,
    split: Annotated[float | None, typer.Option(help="largest exported file in MB, such as 16")] = None,
    workers: Annotated[int | None, typer.Option(help="processes that render; 0 for none")] = None,
    art: Annotated[Path | None, typer.Option(help="another art pack, on purpose")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line, for programs")] = False,
) -> None:
    """Train the embedded model in stages: images, autoencoder, tokenizer, text, latents, unet, export;
    then its few-step adapters, and the encoders that evaluate its images: dual-encoder, classifier.

    Every stage resumes where it stopped; Ctrl-C saves first. Budgets can grow: a finished stage then
    trains further.
    """
    from tools.tiny_training import stages
    from tools.tiny_training.job import Job
    from tools.tiny_training.recipes import recipe

    from minikin.cli import display
    from minikin.files import cache_folder
    from minikin.models.device import resolve

    where = resolve(None if device == "auto" else device)[0].type
    preset = preset or ("gpu" if where == "cuda" else "cpu")
    m, n = _budgets(minutes, "--minutes"), {k: round(v) for k, v in _budgets(steps, "--steps").items()}
    job = Job(
        recipe=recipe(world, preset),
        out=out or cache_folder() / f"tiny-{world}-{preset}",
        device=where,
        workers=max(1, (os.cpu_count() or 2) - 1) if workers is None else workers,
        art=art,
        source=source,
        split=split,
        minutes=m,
        steps=n,
    )
    _set_up()
    with exit_on_error():  # inside the command, because typer ends without a message after Ctrl-C
        done = display.run(stages.run(job, stage or ()), as_json=as_json)
    if as_json:
        display.emit({"event": "done", "result": str(done.result), **done.facts})


def _set_up() -> None:
    """Turn off other libraries' progress bars and turn on fast convolutions and matrix products."""
    import diffusers
    import torch
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")


def _budgets(values: list[str] | None, flag: str) -> dict[str, float]:
    """Budgets by stage from texts "STAGE=NUMBER". Raises BadRecipe."""
    from tools.tiny_training.job import canonical

    from minikin.errors import BadRecipe

    out = {}
    for text in values or ():
        name, _, value = text.partition("=")
        try:
            out[canonical(name)] = float(value)
        except ValueError:
            raise BadRecipe(f"{flag} expects STAGE=NUMBER, for example unet=30, but got '{text}'.") from None
    return out


if __name__ == "__main__":
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with exit_on_error():
        typer.run(main)
