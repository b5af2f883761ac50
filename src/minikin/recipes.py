"""Recipes: everything one run was asked for, as data. Every default lives here.

The same models drive the command line's flags, the HTTP schema, the page's forms and the JSON
inside pictures. A recipe is checked when it is made; what is wrong is said in one sentence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from minikin.errors import BadRecipe

MAX_SIDE = 4096  # px
MAX_STEPS = 1000
N_TRAIN = 1000  # timesteps all bases were trained with
ROW_RATE = 0.1  # of the value targets in mode row, which learns more slowly (docs/measurements.md)

MaskKind = Literal["attention", "clipseg", "none"]
KeyLock = Literal["local", "global"]
EngineName = Literal["eager", "compile", "openvino"]


def _numbers(given: Any) -> Any:
    """ "0.6,1,1.3" as a list."""
    return [part.strip() for part in given.split(",")] if isinstance(given, str) else given


def _span(given: Any) -> Any:
    """ "0.2-0.8" as a pair."""
    return [part.strip() for part in given.split("-")] if isinstance(given, str) else given


Share = Annotated[float, Field(ge=0, le=1)]
Span = Annotated[tuple[Share, Share], BeforeValidator(_span)]  # of a picture's steps: from, up to
Shares = Annotated[tuple[Share, ...], BeforeValidator(_numbers)]
Spans = Annotated[tuple[Span, ...], BeforeValidator(_numbers)]
Strength = Annotated[float, Field(ge=0, le=2)]
Softness = Annotated[float, Field(gt=0, le=5)]
Scale = Annotated[float, Field(ge=0, le=50)]
WHOLE: tuple[float, float] = (0.0, 1.0)


class Recipe(BaseModel):
    """Common behaviour: strict names, one-sentence errors."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @classmethod
    def make(cls, **values: Any) -> Any:
        """Build from keyword arguments; None means "not given". Raises BadRecipe."""
        try:
            return cls(**{k: v for k, v in values.items() if v is not None})
        except ValidationError as e:
            raise BadRecipe(first_sentence(e)) from None


def first_sentence(e: ValidationError) -> str:
    """The first problem of a validation as a sentence a user can act on."""
    problem = e.errors(include_url=False)[0]
    where = ".".join(str(p) for p in problem["loc"])
    what = problem["msg"].removeprefix("Value error, ")
    what = what.replace("Input should be greater than or equal to", "must be at least")
    what = what.replace("Input should be less than or equal to", "must be at most")
    what = what.replace("Input should be", "must be")
    given = problem.get("input")
    shown = f" (it is {given!r})" if isinstance(given, int | float | str) else ""
    if not where:
        return f"{what[0].upper()}{what[1:]}{shown}."
    return f"{where}: {what[0].lower()}{what[1:]}{shown}."


class Teach(Recipe):
    """Teach one concept from photos."""

    name: str = Field(description="the concept's word in prompts, for example tom")
    category: str = Field(description="what kind of thing it is, for example cat")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    mode: Literal["gated", "row"] = Field("gated", description="gated: Perfusion; row: value difference alone")
    steps: int | None = Field(
        None, ge=1, le=20_000, description="fixed number of steps; by default it stops by itself"
    )
    max_steps: int = Field(400, ge=1, le=20_000, description="upper bound when it stops by itself")
    batch: int = Field(8, ge=1, le=256, description="photos per step")
    value_rate: float = Field(
        0.03, gt=0, le=10, description="learning rate of the value targets; 0.1 in mode row by default"
    )
    word_rate: float = Field(0.006, ge=0, le=10, description="learning rate of the word vectors")
    beta: float = Field(0.75, ge=-2, le=3, description="gate: half open at this similarity, while teaching")
    tau: float = Field(0.10, gt=0, le=5, description="gate: softness, while teaching")
    positions: Literal["all", "own"] = Field("all", description="which positions of a prompt the gate may open")
    mask: MaskKind = Field("attention", description="where the subject is: attention, clipseg or none")
    flip: bool = Field(True, description="also learn mirrored photos; turn off for asymmetric subjects")
    captions: str | None = Field(None, description="file with one caption a line, for C")
    size: int | None = Field(None, ge=64, le=MAX_SIDE, description="side of the training pictures in pixels")
    seed: int = Field(0, ge=0, lt=2**32, description="equal seeds give equal files")
    sample_every: int = Field(100, ge=0, description="steps between sample pictures; 0 for none")
    preview: bool = Field(True, description="a small picture of the concept inside its file")
    int8: bool | None = Field(None, description="store value differences in 8 bits; default for SDXL only")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_the_mode(cls, values: Any) -> Any:
        """Mode row has no word to learn: its values move faster."""
        if isinstance(values, dict) and values.get("mode") == "row" and values.get("value_rate") is None:
            values = {**values, "value_rate": ROW_RATE}
        return values


class Tuned(Recipe):
    """What one concept is painted with where the prompt does not say."""

    strength: Strength = 1.0
    tau: Softness | None = None
    switch: Share = 0.0


class Paint(Recipe):
    """Paint pictures from a prompt."""

    prompt: str = Field(description="what to paint; <tom> stands for the concept tom")
    negative: str = Field("", description="what to keep out")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    n: int = Field(1, ge=1, le=1000, description="how many pictures")
    seed: int = Field(0, ge=0, lt=2**63, description="picture i uses seed + i")
    preset: str | None = Field(
        None, description="quality, lcm, lcm-lora, turbo, lightning, hyper, ...; what the base was made for"
    )
    steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="denoising steps; the preset's by default")
    guidance: float | None = Field(
        None, ge=0, le=50, description="classifier-free guidance scale; the preset's by default"
    )
    force: bool = Field(False, description="keep steps, guidance and scheduler the preset is not made for")
    scheduler: str | None = Field(
        None, description="for example 'DPM++ 2M', 'Euler a', ddim; the base's own by default"
    )
    size: str | None = Field(None, description="512 or 512x768, width x height; the base's own by default")
    width: int | None = Field(None, ge=16, le=MAX_SIDE, description="pixels, a multiple of 8")
    height: int | None = Field(None, ge=16, le=MAX_SIDE, description="pixels, a multiple of 8")
    lock: KeyLock = Field("local", description="key lock: local or global")
    beta: float | None = Field(
        None, ge=-2, le=3, description="gate of all concepts: half open at this similarity"
    )
    tau: float | None = Field(None, gt=0, le=5, description="gate of all concepts: softness")
    switch: float | None = Field(
        None, ge=0, le=1, description="share of the steps in which the category stands in for the concept"
    )
    interval: Span | None = Field(
        None, description="steps that are guided, as shares: 0.2-0.8; all of them by default"
    )
    points: dict[str, Tuned] | None = Field(
        None, description="concepts' operating points, in place of those in their files"
    )
    batch: int = Field(4, ge=1, le=64, description="pictures computed at once")
    engine: EngineName = Field("eager", description="who computes: eager (exact), compile or openvino (faster)")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="before")
    @classmethod
    def _size(cls, values: Any) -> Any:
        """size="512x768" or "512" sets width and height."""
        if isinstance(values, dict) and values.get("size"):
            sides = str(values["size"]).lower().split("x")
            if len(sides) > 2 or not all(s.strip().isdigit() for s in sides):
                raise ValueError("write the size as 512 or 512x768 (width x height)")
            width, height = int(sides[0]), int(sides[-1])
            values = {**values, "size": None, "width": width, "height": height}
        return values

    @model_validator(mode="after")
    def _multiples_of_8(self) -> Paint:
        if self.interval:
            _check_spans((self.interval,))
        for name in ("width", "height"):
            value = getattr(self, name)
            if value is not None and value % 8:
                near = 8 * max(2, round(value / 8))
                raise ValueError(f"{name} must be divisible by 8, but it is {value}; use {near}")
        return self


def _check_spans(spans: tuple[tuple[float, float], ...]) -> None:
    for low, high in spans:
        if not low < high:
            raise ValueError(f"a guidance interval goes up, as 0.2-0.8 does, but it is {low:g}-{high:g}")


class Sweep(Recipe):
    """Find a concept's best operating points for one preset, by painting and judging."""

    concept: str = Field(description="its name or file")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    preset: str | None = Field(None, description="whose points they will be; what the base was made for")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="denoising steps; the preset's by default")
    judge: str = Field("tiny", description="who compares: tiny (its own world alone), clip-b32 or clip-l14")
    photos: str | None = Field(
        None, description="folder of the concept's photos, with others in unseen/; an example's own by default"
    )
    texts: str | None = Field(
        None, description="file with one prompt a line, {} where the thing is named; scenes by default"
    )
    prompts: int = Field(12, ge=4, le=200, description="how many prompts are painted")
    seeds: int = Field(2, ge=1, le=64, description="pictures of each prompt in the last round")
    strengths: Annotated[tuple[Strength, ...], BeforeValidator(_numbers)] = Field(
        (0.6, 0.8, 1.0, 1.3, 1.6), min_length=1, description="strengths to try"
    )
    taus: Annotated[tuple[Softness, ...], BeforeValidator(_numbers)] = Field(
        (0.1, 0.15, 0.25), min_length=1, description="softnesses of the gate to try; not in mode row"
    )
    guidances: Annotated[tuple[Scale, ...], BeforeValidator(_numbers)] | None = Field(
        None, min_length=1, description="guidance scales to try; the preset's, and with many steps 1.5 times it"
    )
    switches: Shares = Field(
        (0.0, 0.1, 0.2, 0.35), min_length=1, description="shares of the steps that the category goes first"
    )
    intervals: Spans = Field(
        (WHOLE, (0.2, 0.8)), min_length=1, description="shares of the steps that are guided: 0-1,0.2-0.8"
    )
    budget_minutes: float | None = Field(
        None, gt=0, description="try only so many settings, drawn from the grid; all by default"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the first pictures; the last round has others")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")

    @model_validator(mode="after")
    def _understood(self) -> Sweep:
        _check_spans(self.intervals)
        return self


class Compare(Recipe):
    """Compare Perfusion with other methods on the same photos, by painting and judging."""

    photos: str = Field(description="folder with photos of one thing, and others of it in unseen/")
    category: str = Field(description="what kind of thing it is, for example cat")
    name: str = Field("mine", description="its word in prompts")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    methods: str = Field("all", description="all, or some: perfusion-gated,perfusion-row,dreambooth-lora,...")
    judge: str = Field("tiny", description="who compares: tiny (its own world alone), clip-b32 or clip-l14")
    texts: str | None = Field(
        None, description="file with one prompt a line, {} where the thing is named; scenes by default"
    )
    prompts: int = Field(6, ge=2, le=200, description="how many prompts are painted")
    seeds: int = Field(2, ge=1, le=64, description="pictures of each prompt")
    plain: int = Field(4, ge=2, le=1000, description="pictures of the plain category, to measure drift")
    strengths: Annotated[tuple[Strength, ...], BeforeValidator(_numbers)] = Field(
        (0.6, 1.4), description="strengths of the front, besides 1; weights of other methods' changes"
    )
    steps: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_STEPS)], ...], BeforeValidator(_numbers)] = Field(
        (50, 4, 1), min_length=1, description="numbers of denoising steps; few ones by presets made for them"
    )
    teach_steps: int | None = Field(
        None, ge=1, le=20_000, description="the same number of teaching steps for all; by method"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of teaching, and of the first picture of each prompt")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="float32, float16 or bfloat16")


Method = Literal["lcm", "lcm-lora", "turbo", "tdm"]

# What each method was published with: arXiv:2310.04378 (lcm), 2311.05556 (lcm-lora), 2311.17042 (turbo),
# 2503.06674 (tdm); guidance here is w + 1 of LCM's w. Of turbo full weights were published, of tdm LoRAs
# (its code has a rate of 4e-6); the rates of a LoRA of either are ours.
PUBLISHED: dict[str, dict[str, Any]] = {
    "lcm": {"student": "full", "rate": 1e-6, "guidance": "3-15", "batch": 12, "steps": 4000,
            "target_ema": 0.95},
    "lcm-lora": {"student": "lora", "rate": 1e-4, "guidance": "8.5", "batch": 12, "steps": 3000},
    "turbo": {"student": "full", "rate": 1e-5, "side_rate": 1e-4, "guidance": "1", "batch": 128, "steps": 4000},
    "tdm": {"student": "lora", "rate": 4e-5, "side_rate": 2e-5, "guidance": "4.5", "batch": 32, "steps": 2000},
}  # fmt: skip
# tiny is narrow and quick to learn: higher rates, its own guidance of 4, a rate that falls, averaging
TINY: dict[str, dict[str, Any]] = {
    "lcm": {"rate": 2e-4, "guidance": "2-8", "batch": 32, "decay": 0.5, "ema": 0.99, "steps": 3000},
    "lcm-lora": {"rate": 2e-4, "guidance": "4", "batch": 32, "decay": 0.5, "ema": 0.99},
    "turbo": {
        "student": "lora", "rate": 2e-4, "side_rate": 5e-4, "guidance": "4", "batch": 32, "decay": 0.5,
        "ema": 0.99, "steps": 3000,
    },
    "tdm": {"rate": 2e-4, "side_rate": 2e-4, "fake": "full", "guidance": "4", "decay": 0.5, "ema": 0.99},
}  # fmt: skip
STUDENT_TIMES = {"demo": (999, 899, 799, 699)}  # the ADD authors' demonstration; other names: `Distill.times`


class Distill(Recipe):
    """Distil a base into one that paints in one to four steps."""

    method: Method = Field(description="lcm, lcm-lora, turbo (adversarial) or tdm (distribution matching)")
    data: str = Field(
        description="folder of captioned pictures, .tar files, a text file of captions, or scenes:small"
    )
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    student: Literal["lora", "full"] | None = Field(None, description="what is trained; by method")
    rank: int = Field(64, ge=1, le=1024, description="rank of the LoRA")
    alpha: float | None = Field(None, gt=0, description="alpha of the LoRA; the rank by default")
    steps: int | None = Field(None, ge=1, description="budget in steps; exactly repeatable; by method")
    minutes: float | None = Field(None, gt=0, description="budget in minutes instead")
    batch: int | None = Field(
        None, ge=1, le=65536, description="examples per step, over all processes; by method"
    )
    accumulation: int = Field(1, ge=1, description="pieces a batch is computed in, to save memory")
    rate: float | None = Field(None, gt=0, le=1, description="learning rate of the student; by method")
    side_rate: float | None = Field(
        None, gt=0, le=1, description="learning rate of the fake score or the discriminator; by method"
    )
    warmup: int = Field(0, ge=0, description="steps over which the rates rise")
    decay: float | None = Field(
        None, ge=0, le=1, description="last share of the budget, in which the rates fall; 0, on tiny half"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of the student's gradient")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    ema: float | None = Field(None, ge=0, lt=1, description="averaging of the result; none, on tiny 0.99")
    guidance: str | None = Field(
        None, description="the teacher's guidance scale as in painting, 8.5, or a range, 3-15; by method"
    )
    loss: Literal["huber", "l2"] = Field("huber", description="distance: pseudo-Huber or squared")
    huber: float = Field(0.001, gt=0, description="c of the pseudo-Huber distance")
    skip: int = Field(20, ge=1, le=500, description="lcm: timesteps of the teacher's one step")
    target_ema: float | None = Field(None, ge=0, lt=1, description="lcm: averaging of the target network; 0.95")
    student_steps: int | None = Field(
        None, ge=1, le=16, description="turbo, tdm: steps the student is made for; 4, or what times lists"
    )
    times: str = Field(
        "trailing", description="turbo, tdm: the student's timesteps: trailing (999, 749, ...), demo or a list"
    )
    fake: Literal["lora", "full"] | None = Field(None, description="tdm: what of the fake score is trained")
    snr: float = Field(5.0, gt=0, description="tdm: bound of the fake score's weight min(SNR, bound)")
    ida: float = Field(
        1.0, gt=0, le=1, description="tdm: share the fake score keeps of itself per step; 1 is off"
    )
    gan: float = Field(
        0.0, ge=0, description="tdm: weight of the student's adversarial loss; 0 is off, 0.01 usual"
    )
    heads: float = Field(0.03, ge=0, description="tdm: weight of the discriminator's loss")
    features: str = Field(
        "teacher", description="turbo: what the discriminator sees by: teacher (latents), or dinov2 (pixels)"
    )
    distillation: float = Field(2.5, ge=0, description="turbo: weight of the distillation loss (lambda)")
    weighting: Literal["exponential", "sds", "nfsd"] = Field(
        "exponential", description="turbo: weight of the distillation loss over noise levels"
    )
    negative: str = Field("blurry, low quality, ugly", description="turbo, nfsd: the prompt of bad pictures")
    r1: float = Field(1e-5, ge=0, description="turbo: gradient penalty on what the heads see")
    size: int | None = Field(None, ge=16, le=MAX_SIDE, description="side of the pictures in pixels")
    count: int | None = Field(None, ge=1, description="examples used at most; of scenes 8192 by default")
    teacher_steps: int = Field(
        25, ge=1, le=MAX_STEPS, description="of pictures the teacher paints for captions"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="equal seeds give equal results on one machine")
    autocast: bool | None = Field(None, description="compute in bfloat16 over float32 weights; on CUDA")
    half: bool = Field(True, description="store the result in float16")
    save_minutes: float = Field(3.0, ge=0, description="minutes between checkpoints")
    sample_minutes: float = Field(10.0, gt=0, description="minutes between sample pictures")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="of the frozen teacher: float32, float16 or bfloat16")

    @model_validator(mode="after")
    def _understood(self) -> Distill:
        _ = self.scales, self.student_times(N_TRAIN)
        if N_TRAIN % self.skip or N_TRAIN // self.skip < 4:
            raise ValueError(f"skip must divide {N_TRAIN} into at least 4 equal steps, as 20 and 50 do")
        if self.method == "tdm" and self.times != "trailing":
            raise ValueError("times of a tdm student must be trailing: DDIM paints with them")
        fixed = {"lcm": "full", "lcm-lora": "lora"}.get(self.method)
        if fixed and self.student not in (None, fixed):
            raise ValueError(
                f"method {self.method} trains student {fixed}; use lcm for full, lcm-lora for lora"
            )
        return self

    @property
    def scales(self) -> tuple[float, float]:
        """Guidance from .. to, as classifier-free guidance scales (1 is none)."""
        parts = (self.guidance or "1").split("-")
        try:
            low, high = float(parts[0]), float(parts[-1])
        except ValueError:
            low, high = 0.0, 0.0
        if not 1 <= low <= high <= 50 or len(parts) > 2:
            raise ValueError(f"guidance must be a scale of 1 to 50 or a range like 3-15, not '{self.guidance}'")
        return low, high

    def student_times(self, n_train: int) -> tuple[int, ...]:
        """The timesteps the student is called at, falling; turbo and tdm."""
        if self.times == "trailing":
            k = self.student_steps or 4
            return tuple(round(n_train - i * n_train / k) - 1 for i in range(k))
        try:
            listed = STUDENT_TIMES.get(self.times) or tuple(int(t) for t in self.times.split(","))
        except ValueError:
            raise ValueError(
                f"times must be trailing, demo or numbers like 999,749,499,249, not '{self.times}'"
            ) from None
        k = self.student_steps or len(listed)
        if k > len(listed) or (k < len(listed) and self.times not in STUDENT_TIMES):
            raise ValueError(f"times lists {len(listed)} timesteps, but student_steps is {k}; leave one out")
        found = listed[:k]
        if list(found) != sorted(set(found), reverse=True) or found[-1] < 1 or found[0] >= n_train:
            raise ValueError(f"times must fall from at most {n_train - 1} to at least 1, but they are {found}")
        return found

    def settled(self, tiny: bool) -> Distill:
        """The same with every "by method" decided: what was published, or what suits tiny."""
        known = {"decay": 0.0, "ema": 0.0, "target_ema": 0.0, "fake": "lora", "side_rate": 1e-4}
        known |= PUBLISHED[self.method] | (TINY[self.method] if tiny else {})
        if self.steps or self.minutes:
            known.pop("steps", None)
        asked = {k: v for k, v in self.model_dump().items() if v is not None}
        settled: Distill = Distill.make(**known | asked)
        return settled


BaselineMethod = Literal[
    "textual-inversion", "dreambooth", "dreambooth-prior", "dreambooth-lora", "custom-diffusion"
]

# What each method was published with for bases of SD's size, on one GPU: the training scripts of
# diffusers, which all use AdamW with betas 0.9 and 0.999, weight decay 0.01 and a constant rate. Rates
# that their scripts multiply by the batch are given as they come out (5e-4 x 4; 1e-5 x 4). Papers:
# Gal et al. 2022, arXiv:2208.01618; Ruiz et al. 2023, arXiv:2208.12242; Kumari et al. 2023,
# arXiv:2212.04488 (Custom Diffusion's augmentation by scale is left out: all methods see the same photos).
PUBLISHED_BASELINES: dict[str, dict[str, Any]] = {
    "textual-inversion": {"rate": 2e-3, "steps": 3000, "batch": 4},
    "dreambooth": {"rate": 5e-6, "steps": 400, "batch": 1},
    "dreambooth-prior": {"rate": 5e-6, "steps": 800, "batch": 1, "prior": 1.0, "class_pictures": 200},
    "dreambooth-lora": {"rate": 1e-4, "steps": 500, "batch": 1},
    "custom-diffusion": {
        "rate": 4e-5, "steps": 250, "batch": 4, "prior": 1.0, "class_pictures": 200, "flip": True,
    },
}  # fmt: skip
# tiny: as many photos a step as Minikin's own teaching sees. First values, from looking at one run each;
# benchmarks/baselines.py searches rate x steps
TINY_BASELINES: dict[str, dict[str, Any]] = {
    "textual-inversion": {"rate": 5e-3, "steps": 400, "batch": 8, "flip": True},
    "dreambooth": {"rate": 1e-4, "steps": 100, "batch": 8, "flip": True},
    "dreambooth-prior": {"rate": 1e-4, "steps": 100, "batch": 8, "flip": True, "class_pictures": 32},
    "dreambooth-lora": {"rate": 1e-3, "steps": 200, "batch": 8, "flip": True},
    "custom-diffusion": {"rate": 1e-3, "steps": 200, "batch": 8, "class_pictures": 32},
}  # fmt: skip


class Baseline(Recipe):
    """Teach one concept by another method than Minikin's, for comparison."""

    method: BaselineMethod = Field(description="textual-inversion, dreambooth, dreambooth-lora, ...")
    name: str = Field(description="the concept's word in prompts, for example tom")
    category: str = Field(description="what kind of thing it is, for example cat")
    base: str = Field("tiny", description="base model: a name, folder, .safetensors file or hub id")
    word: str | None = Field(
        None, description="the rare word, one token, that stands for the thing; by method and base"
    )
    steps: int | None = Field(None, ge=1, le=100_000, description="number of steps; by method")
    batch: int | None = Field(None, ge=1, le=256, description="photos per step; by method")
    accumulation: int = Field(1, ge=1, description="pieces a batch is computed in, to save memory")
    rate: float | None = Field(None, gt=0, le=10, description="learning rate; by method")
    rank: int = Field(4, ge=1, le=1024, description="dreambooth-lora: rank of the LoRA")
    prior: float | None = Field(
        None, ge=0, le=100, description="weight of the loss on pictures of the category; by method"
    )
    class_pictures: int | None = Field(
        None, ge=1, le=10_000, description="how many of those the base paints; 200, on tiny 32"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    mask: MaskKind = Field(
        "none", description="where the subject is: none as published, or attention or clipseg as in teach"
    )
    captions: bool = Field(True, description="use the photos' own captions where they have them")
    flip: bool | None = Field(None, description="also learn mirrored photos; by method")
    size: int | None = Field(None, ge=64, le=MAX_SIDE, description="side of the training pictures in pixels")
    seed: int = Field(0, ge=0, lt=2**32, description="equal seeds give equal files")
    save_minutes: float = Field(3.0, ge=0, description="minutes between checkpoints")
    device: str | None = Field(None, description="cuda, mps, xpu or cpu")
    dtype: str | None = Field(None, description="of the frozen base: float32, float16 or bfloat16")

    def settled(self, tiny: bool) -> Baseline:
        """The same with every "by method" decided: what was published, or what suits tiny."""
        known: dict[str, Any] = {"prior": 0.0, "flip": False, "class_pictures": 32 if tiny else 200}
        known |= PUBLISHED_BASELINES[self.method] | (TINY_BASELINES[self.method] if tiny else {})
        asked = {k: v for k, v in self.model_dump().items() if v is not None}
        settled: Baseline = Baseline.make(**known | asked)
        return settled
