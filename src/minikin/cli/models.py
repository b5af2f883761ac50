"""The commands models list, add, pull, convert and show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minikin.cli.flags import JsonOnce

app = typer.Typer(invoke_without_command=True, help="List, add, download and inspect base models; alone: list.")


@app.callback()
def alone(ctx: typer.Context) -> None:
    """List, add, download and inspect base models; alone: list."""
    if ctx.invoked_subcommand is None:
        list_()


@app.command("list")
def list_(as_json: JsonOnce = False) -> None:
    """Bases on this machine, and published bases and adapters you can pull."""
    from minikin.cli import display
    from minikin.models.loading.hub import AUXILIARY_MODELS
    from minikin.models.loading.registry import PUBLISHED, TINY_LICENCE, entries, models_folder
    from minikin.models.presets import local_file, sources

    rows = [{"name": "tiny", "architecture": "tiny", "where": "embedded", "licence": TINY_LICENCE}]
    rows += [
        {"name": e.name, "architecture": e.architecture, "where": str(e.path), "licence": e.licence}
        for e in entries().values()
    ]
    rows += [
        {"name": name, "architecture": k.architecture, "licence": k.licence,
         "where": f"minikin models pull {name} ({k.gb:g} GB)"}
        for name, k in PUBLISHED.items()
    ]  # fmt: skip
    rows += [
        {"name": name, "architecture": "-", "licence": h.licence,
         "where": str(here) if (here := models_folder() / name).is_dir() else f"minikin models pull {name}"}
        for name, h in AUXILIARY_MODELS.items()
    ]  # fmt: skip
    rows += [
        {"name": name, "architecture": "LoRA", "licence": s.licence or "see its page",
         "where": str(local_file(s) or f"minikin models pull {name} ({s.mb} MB)")}
        for name, s in sources().items()
    ]  # fmt: skip
    for row in rows:
        if as_json:
            display.emit(row)
        else:
            display.out.print(
                f"{row['name']:18} {row['architecture']:6} {row['where']}  [{row['licence'] or 'none stated'}]",
                soft_wrap=True,
            )  # fmt: skip


@app.command()
def add(
    path: Annotated[Path, typer.Argument(help="a .safetensors checkpoint or LoRA, or a diffusers folder")],
    name: Annotated[str | None, typer.Option(help="the name to use \\[the file's]")] = None,
    prediction: Annotated[str | None, typer.Option(help="epsilon or v_prediction, if not recognised")] = None,
) -> None:
    """Use a model you already have. Never needs the network."""
    from minikin.cli import display
    from minikin.models.loading import registry
    from minikin.models.lora import adapters

    if adapters.is_lora(path):
        adapter = adapters.add(path, name)
        display.out.print(f"{adapter.stem}: a LoRA; try <lora:{adapter.stem}:0.8> in a prompt", soft_wrap=True)
        return
    entry = registry.add(path, name, prediction)
    display.out.print(
        f"{entry.name}: {entry.architecture}{', ' + entry.prediction if entry.prediction else ''} from "
        f"{entry.path}\ntry: minikin paint \"a cat\" --base {entry.name}",
        soft_wrap=True,
    )  # fmt: skip


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="a published model, see `models list`, or owner/name")],
    revision: Annotated[
        str | None, typer.Option(help="commit, tag or refs/pr/N to pin it to \\[the newest commit]")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="accept the licence without a question")] = False,
    as_json: JsonOnce = False,
) -> None:
    """Download a published model: shows size and licence first, resumes, checks every file."""
    from minikin.cli import display
    from minikin.models.loading import hub

    p = hub.plan(name, revision)
    display.err.print(
        f"{p.repo} at {p.revision[:8]}: {len(p.files)} files, {p.size / 1e9:.2f} GB\nlicence: {p.licence}"
    )
    if not yes and not typer.confirm("Download under this licence?"):
        raise typer.Exit(2)
    done = display.run(hub.pull(p), as_json=as_json)
    name = done.result.name if done.result else name
    if as_json:
        display.emit({"event": "done", "name": name, **done.facts})
    else:
        display.out.print(f"{name}: in {done.facts['folder']}", soft_wrap=True)


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(help="pickled PyTorch weights: .bin, .pt, .pth or .ckpt")],
    out: Annotated[Path | None, typer.Option(help="the new file \\[beside it, .safetensors]")] = None,
) -> None:
    """Convert pickled weights to .safetensors, offline, in a sandbox that executes nothing in them."""
    from minikin.cli import display
    from minikin.models.loading.convert import convert as convert_file

    converted, n = convert_file(path, out)
    display.out.print(f"{converted}: {n} tensors", soft_wrap=True)


@app.command()
def show(name: str, as_json: JsonOnce = False) -> None:
    """Show a base: architecture, sizes, cross-attention layers, fingerprint, hashes."""
    from minikin.cli import display
    from minikin.models.loading.registry import open_base

    base = open_base(name, device="cpu")
    facts = {
        "name": base.name, "architecture": base.architecture, "prediction": base.prediction_type,
        "picture_px": base.size_px, "sites": len(base.layout.layers),  # word: JSON output of 0.1
        "text_width": base.layout.text_width,
        "packed_width": base.layout.width, "tokens": base.n_tokens,
        "guidance_embedding": base.has_guidance_embedding,
        "concept_bytes_fp16": 2 * base.layout.n_values, "fingerprint": base.fingerprint,
        "text_hash": base.text_hash, "licence": base.licence,
    }  # fmt: skip
    if as_json:
        display.emit(facts)
        return
    for key, value in facts.items():
        display.out.print(f"{key:20} {value}", soft_wrap=True)
