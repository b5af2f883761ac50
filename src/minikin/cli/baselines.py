"""The command baseline."""

from __future__ import annotations

from pathlib import Path

from minikin import events, files
from minikin.cli import display
from minikin.evaluation.compare.report import size
from minikin.recipes import Baseline
from minikin.studio import Studio

IN_DIFFUSERS = {
    "textual-inversion": 'pipe.load_textual_inversion("{out}/learned_embeds.safetensors", token="<{name}>")',
    "dreambooth": 'pipe.unet = UNet2DConditionModel.from_pretrained("{out}/unet")',
    "dreambooth-prior": 'pipe.unet = UNet2DConditionModel.from_pretrained("{out}/unet")',
    "dreambooth-lora": 'pipe.load_lora_weights("{out}")',
    "custom-diffusion": 'pipe.unet.load_attn_procs("{out}", weight_name="'
    'pytorch_custom_diffusion_weights.safetensors", _pipeline=pipe); '
    'pipe.load_textual_inversion("{out}/{name}.safetensors")',
}  # fmt: skip


def run(photos: Path, recipe: Baseline, out: Path, *, resume: bool, as_json: bool) -> None:
    """Teach a concept by another method; the result goes into the folder."""
    with files.lock(out / ".lock", str(out)):
        studio = Studio.open(recipe.base, device=recipe.device, dtype=recipe.dtype)
        done = display.run(studio.teaching_baseline(photos, recipe, out, resume=resume), as_json=as_json)
    _report(done, out, recipe, as_json)


def _report(done: events.Done, out: Path, recipe: Baseline, as_json: bool) -> None:
    facts = {"event": "done", "out": str(out), "word": done.result.word, "phrase": done.result.phrase}
    if as_json:
        display.emit(facts | done.facts)
        return
    sizes = done.facts["sizes"]
    display.out.print(
        f"{out}/  {done.facts['bytes']:,} bytes, {done.facts['steps']} steps in {done.facts['seconds']:.0f} s\n"
        f"in float32 for SD 1.5: {size(sizes['sd15'])}; for SDXL: {size(sizes['sdxl'])}\n"
        f"in diffusers: {IN_DIFFUSERS[recipe.method].format(out=out, name=recipe.name)}\n"
        f'prompts: "{_example(done, recipe)}"',
        soft_wrap=True,
    )  # fmt: skip


def _example(done: events.Done, recipe: Baseline) -> str:
    """A prompt for diffusers; learned words are added there under the concept's name."""
    text: str = done.result.prompt(f"a photo of <{recipe.name}> on the beach")
    if done.result.words:
        text = text.replace(f" {done.result.word}", f" <{recipe.name}>", 1)
    return text
