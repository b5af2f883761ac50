"""A1111's fields of /txt2img and /img2img as a recipe's, with a warning for each that is not done.

Clients send some 45 fields whatever they want. Three kinds: followed (in the models below); refused, since the
image would be another one altogether (`_refused`); not done, with a warning in `info` unless the value changes
nothing (`NOT_DONE`). Fields that are unknown here are named in one warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from minikin.printable import escaped
from minikin.server.api.shared import known_fields, seed_of
from minikin.server.errors import RequestRejected, invalid_field

UNSUPPORTED = "unsupported_field"
MAX_NAMED = 8  # unknown fields in a warning

# field -> (what happens instead, values that change nothing besides None)
NOT_DONE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "restore_faces": ("faces are not restored", (False,)),
    "tiling": ("the image does not tile", (False,)),
    "refiner_checkpoint": ("there is no refiner", ("", "None", "none")),
    "eta": ("the sampler's own value is used", (0, 1)),
    "s_churn": ("no noise is added", (0,)), "s_noise": ("the noise is not scaled", (0, 1)),
    "s_min_uncond": ("guidance acts in every step", (0,)),
    "initial_noise_multiplier": ("the noise is not scaled", (0, 1)),
    "seed_resize_from_h": ("the noise is of the image's own size", (0, -1)),
    "seed_resize_from_w": ("the noise is of the image's own size", (0, -1)),
    "disable_extra_networks": ("LoRAs in the prompt are used", (False,)),
    "infotext": ("only the fields of the request are read", ("",)),
    "latent_mask": ("the mask is `mask`", ("",)), "mask_round": ("masks have no half tones", (True,)),
}  # fmt: skip
HARMLESS = frozenset(
    "subseed firstphase_width firstphase_height denoising_strength hr_scale hr_upscaler hr_second_pass_steps "
    "hr_resize_x hr_resize_y hr_checkpoint_name hr_sampler_name hr_scheduler hr_prompt hr_negative_prompt "
    "hr_cfg hr_distilled_cfg hr_additional_modules do_not_save_samples do_not_save_grid save_images comments "
    "script_args override_settings_restore_afterwards s_tmin s_tmax image_cfg_scale distilled_cfg_scale "
    "refiner_switch_at inpainting_mask_weight url auth".split()
)

# options: refused unless named here; those with a sentence are not done, with a warning
OPTIONS_NOT_DONE = {
    "sd_vae": "the base's own VAE is used", "eta_noise_seed_delta": "the noise follows the seed alone",
    "samples_format": "images are PNG", "randn_source": "the noise is the CPU's",
    "forge_additional_modules": "the base has what it needs", "forge_preset": "the base sets its defaults",
    "img2img_background_color": "transparent images lie on white", "emphasis": "the emphasis is A1111's own",
    "sd_vae_overrides_per_model_preferences": "the base's own VAE is used", "upcast_attn": "",
    "live_previews_enable": "", "show_progress_every_n_steps": "", "return_grid": "images come one by one",
    "color_correction": "colours are not matched", "img2img_color_correction": "colours are not matched",
}  # fmt: skip
CLIP_SKIP = "CLIP_stop_at_last_layers"
OPTIONS: dict[str, Any] = {  # that GET /options tells, besides the checkpoint
    CLIP_SKIP: 1, "samples_format": "png", "sd_vae": "Automatic", "eta_noise_seed_delta": 0,
    "randn_source": "CPU", "img2img_background_color": "#ffffff",
}  # fmt: skip
_NEUTRAL_OPTIONS: dict[str, tuple[Any, ...]] = {
    "sd_vae": ("Automatic", "None", "auto", "Built in", "N/A"), "forge_additional_modules": ([],),
    "samples_format": ("png", "PNG"), "emphasis": ("Original",), "return_grid": (False,),
    "color_correction": (False,), "img2img_color_correction": (False,),
    "sd_vae_overrides_per_model_preferences": (True, False),
}  # fmt: skip


class Txt2Img(BaseModel):
    """The fields of /txt2img that are followed or refused; see the module's docstring for others."""

    model_config = ConfigDict(extra="allow")

    prompt: str = ""
    negative_prompt: str | None = ""
    seed: int | None = Field(-1, ge=-1, lt=2**63)
    subseed_strength: float | None = 0
    sampler_name: str | None = None
    sampler_index: str | int | None = None
    scheduler: str | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int | None = Field(1, ge=1, le=1000)
    n_iter: int | None = Field(1, ge=1, le=1000)
    styles: list[str] | None = None
    enable_hr: bool | None = False
    script_name: str | None = None
    alwayson_scripts: dict[str, Any] | None = None
    override_settings: dict[str, Any] | None = None
    send_images: bool | None = True
    clip_skip: int | None = Field(None, ge=0, le=12)  # SD.Next's name, which SillyTavern sends besides A1111's
    force_task_id: str | None = Field(None, max_length=80)
    preset: str | None = None
    concepts: dict[str, str] | None = None


class Img2Img(Txt2Img):
    """The further fields of /img2img."""

    init_images: list[str] = Field(min_length=1)
    mask: str | None = None
    denoising_strength: float | None = Field(0.75, ge=0, le=1)
    resize_mode: int | None = Field(0, ge=0, le=3)
    mask_blur: int | None = Field(None, ge=0, le=256)
    mask_blur_x: int | None = Field(4, ge=0, le=256)
    mask_blur_y: int | None = Field(4, ge=0, le=256)
    inpainting_fill: int | None = Field(0, ge=0, le=3)
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: int | None = Field(0, ge=0, le=1024)
    inpainting_mask_invert: int | None = 0
    include_init_images: bool | None = False

    @property
    def feather(self) -> int:
        """Width of the blend: `mask_blur`, or the wider of its two directions."""
        if self.mask_blur is not None:
            return self.mask_blur
        return max(4 if self.mask_blur_x is None else self.mask_blur_x, self.mask_blur_y or 0)


def parameters(body: Txt2Img) -> dict[str, Any]:
    """The request's parameters for the response: without its images, unless it asked for them."""
    extra = set(body.model_extra or {})
    images = set() if getattr(body, "include_init_images", False) else {"init_images", "mask"}
    return body.model_dump(exclude=extra | images)


def recipe_fields(kind: str, body: Txt2Img, names: tuple[str, ...]) -> dict[str, Any]:
    """The recipe's fields for this request; raises RequestRejected for what is refused.

    names  of the base, as clients may write them
    """
    for name, value in _refused(body):
        raise invalid_field(
            name, f"{name} is not offered here: leave it out. (It is {value}.)", code=UNSUPPORTED
        )
    settings = body.override_settings or {}
    check_settings(settings, names)
    sampler = body.sampler_name or (body.sampler_index if isinstance(body.sampler_index, str) else None)
    fields: dict[str, Any] = {
        "prompt": body.prompt, "negative": body.negative_prompt or "", "seed": seed_of(body.seed),
        "n": (body.batch_size or 1) * (body.n_iter or 1),
        "steps": body.steps, "guidance": body.cfg_scale, "width": body.width, "height": body.height,
        "preset": body.preset, "schedule": body.scheduler or None,
        "scheduler": None if (sampler or "").lower() in ("", "automatic", "none") else sampler,
        "clip_skip": int(settings.get(CLIP_SKIP) or body.clip_skip or 1),
    }  # fmt: skip
    if kind == "inpaint":  # keeps its image's size
        fields["width"] = fields["height"] = None
    return known_fields(kind, fields)


def _refused(body: Txt2Img) -> Iterator[tuple[str, str]]:
    """Fields that would make another image altogether, and what they ask for."""
    if body.script_name and body.script_name != "None":
        yield "script_name", body.script_name[:40]
    for script, settings in (body.alwayson_scripts or {}).items():
        if not _is_off(settings):
            yield "alwayson_scripts", f"{script[:40]!r}, and not switched off"
    if styles := [style for style in body.styles or () if style and style != "None"]:
        yield "styles", repr(styles[0][:40])
    if body.enable_hr:
        yield "enable_hr", "true; refine the result with img2img in its place"
    if body.subseed_strength:
        yield "subseed_strength", f"{body.subseed_strength:g}"


def _is_off(script: Any) -> bool:
    """Whether a script of `alwayson_scripts` does nothing: without arguments, or with each unit off."""
    arguments = script.get("args") if isinstance(script, dict) else script
    if isinstance(arguments, dict):  # by name
        arguments = [arguments]
    if not isinstance(arguments, list):
        return arguments is None and script != {}
    units = [unit for unit in arguments if isinstance(unit, dict)]
    if units and all(unit.get("enabled", unit.get("enable", unit.get("ad_model", "None") != "None")) is False
                     for unit in units):  # fmt: skip
        return True
    return arguments == [] or arguments[0] is False


def notes_on(body: Txt2Img, followed: Mapping[str, Any]) -> list[str]:
    """What to tell of a request: what older servers ignored and is followed, and what is not done.

    followed  the recipe's fields
    """
    fields, notes = body.model_extra or {}, []
    if (schedule := followed.get("schedule")) and schedule.lower() != "automatic":
        notes.append(f"scheduler asks for the noise schedule {schedule}.")
    if followed.get("clip_skip", 1) != 1:
        notes.append(f"The prompt is read with clip skip {followed['clip_skip']}.")
    for name, (what, neutral) in NOT_DONE.items():
        value = fields.get(name)
        if value is not None and value not in neutral:
            notes.append(f"{name} is not done here: {what}.")
    for name, value in (body.override_settings or {}).items():
        what = OPTIONS_NOT_DONE.get(name, "")
        if what and not _is_neutral_option(name, value):
            notes.append(f"{name} is not done here: {what}.")
    if isinstance(body, Img2Img):
        notes += _not_done_of_img2img(body)
    unknown = sorted(
        escaped(name[:40]) for name, value in fields.items()
        if name not in NOT_DONE and name not in HARMLESS and value not in (None, "", False, 0, [], {})
    )  # fmt: skip
    if unknown:
        more = ", ..." if len(unknown) > MAX_NAMED else ""
        notes.append(f"Not known here, and ignored: {', '.join(unknown[:MAX_NAMED])}{more}.")
    return notes


def _not_done_of_img2img(body: Img2Img) -> Iterator[str]:
    if body.resize_mode == 3:
        yield "resize_mode 3 (in latent space) is not done here: the image is resized in pixels."
    if body.mask is not None and body.inpainting_fill in (2, 3):
        yield (
            f"inpainting_fill {body.inpainting_fill} is not done here: the masked part is filled with its "
            "surroundings (0). With denoising_strength 1 that makes no difference."
        )


def check_settings(settings: Mapping[str, Any], names: tuple[str, ...], *, lasting: bool = False) -> None:
    """Raise RequestRejected (422) for options that cannot be set.

    lasting  for the server, and not for a request: then only values that change nothing may be set
    """
    for name, value in settings.items():
        if name == "sd_model_checkpoint":
            if value not in (None, "", *names):
                message = f"The base is '{names[0]}' and is chosen when the server is started, with --base."
                raise invalid_field(name, message, code=UNSUPPORTED)
        elif name == "sd_checkpoint_hash" or (name in OPTIONS_NOT_DONE and not lasting):
            continue
        elif name == CLIP_SKIP and not lasting:
            if not isinstance(value, int | float) or not 0 <= value <= 12 or value != int(value):
                raise invalid_field(name, f"{name} is a whole number up to 12.", code=UNSUPPORTED)
        elif not _is_neutral_option(name, value):
            raise _unsettable(name, lasting)


def _is_neutral_option(name: str, value: Any) -> bool:
    is_option = name in OPTIONS or name in OPTIONS_NOT_DONE
    neutral = (None, "", *_NEUTRAL_OPTIONS.get(name, ()), *((OPTIONS[name],) if name in OPTIONS else ()))
    return is_option and (value in neutral or not OPTIONS_NOT_DONE.get(name, "x"))


def _unsettable(name: str, lasting: bool) -> RequestRejected:
    hint = " Send it with a request, in override_settings." if lasting and name == CLIP_SKIP else ""
    name = escaped(name[:60])
    return invalid_field(name, f"The option '{name}' cannot be set over HTTP.{hint}", code=UNSUPPORTED)
