"""Model card of an exported build: data, licences, and the cost of training from its logs."""

from __future__ import annotations

from tools.tiny_training import art
from tools.tiny_training.job import Job

from minikin.tiny import vocabulary as words
from minikin.training.metrics_log import MetricsLog

RUNS = {"autoencoder": "autoencoder", "text encoder": "text", "U-Net": "unet"}


def card(job: Job) -> str:
    """The card in Markdown, with the hub's header."""
    r, spec = job.recipe, words.WORLDS[job.recipe.world]
    photographs = "photographs behind some things" if r.images.photos else "no photographs"
    lines = [
        "---",
        "license: apache-2.0",
        "pipeline_tag: text-to-image",
        "library_name: diffusers",
        "---",
        f"# Minikin tiny, {spec.name} world",
        "",
        "A toy text-to-image model with Stable Diffusion's structure (128 px, v-prediction, zero terminal",
        "SNR). It draws stickers on painted backgrounds and exists so that claims can be measured offline.",
        "",
        "## Data",
        "",
        f"{r.images.count} scenes drawn by rule (`minikin.tiny.world`, `{spec.name}`), "
        f"{r.latents.captions} captions of each; {photographs}, no people, no web data. About a tenth of the "
        "combinations of things and",
        f"places never appear. Art pack `{art.fingerprint(job.art)[:16]}`:",
        "",
        "| drawings | package | licence |",
        "|---|---|---|",
        *(f"| {a.credit} | `{a.package}` | {a.licence} |" for a in words.ART_SETS.values()),
        "",
        "## Training",
        "",
        "| part | steps | examples | minutes | on |",
        "|---|---|---|---|---|",
        *(_row(job, name, path) for name, path in RUNS.items()),
    ]
    lines += ["", f"Recipe `{r.preset}`" + (f", going on from {job.source.name}." if job.source else ".")]
    lines += _last(job)
    lines += [
        "",
        "## Limits",
        "",
        f"{len(spec.objects)} kinds of objects, {len(spec.backgrounds)} places, {len(spec.plain)} plain "
        "colours. Anything else is guessed from the nearest word.",
        "",
        "## Licence",
        "",
        "Weights: Apache-2.0. The drawings keep the licences above; Twemoji asks for attribution (CC-BY 4.0).",
        "",
    ]
    return "\n".join(lines)


def _row(job: Job, name: str, path: str) -> str:
    rows = MetricsLog(job.out / path / "log.jsonl").rows()
    steps = [r for r in rows if "seconds" in r]
    if not steps:
        return f"| {name} | | | | taken from {job.source.name if job.source else 'elsewhere'} |"
    last = steps[-1]
    device = next((r["device"] for r in reversed(rows) if "device" in r), "")
    return f"| {name} | {last['step']} | {last['seen']} | {last['seconds'] / 60:.1f} | {device} |"


def _last(job: Job) -> list[str]:
    """The U-Net's last evaluation, as a sentence."""
    evaluations = [
        r["evaluation"] for r in MetricsLog(job.folder("unet") / "log.jsonl").rows() if "evaluation" in r
    ]
    if not evaluations:
        return []
    return [f"Validation v-loss {evaluations[-1]['v-loss']:.4f} (held-out scenes, EMA, uniform timesteps)."]
