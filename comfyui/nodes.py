"""What the two nodes do; `nodes_v3` and `nodes_v1` describe them to ComfyUI."""

from __future__ import annotations

from typing import Any

from . import concepts
from .attention import patched
from .concepts import ConceptInUse
from .conditioning import encode

CATEGORY = "minikin"
CONCEPTS = "MINIKIN_CONCEPTS"
LOAD, ENCODE = "MinikinLoadConcept", "MinikinEncodePrompt"
TITLES = {LOAD: "Load Minikin Concept", ENCODE: "Encode Prompt with Minikin Concepts"}
ABOUT = {
    LOAD: "A personal concept (your cat, your chair) from a file of under 100 KB. Chain several by 'others'.",
    ENCODE: "Encodes a prompt that names concepts, <tom>, and returns the model that follows it. Plain "
    "prompts, for example negative ones, are encoded as usual.",
}
HELP = {
    "file": "A concept file in models/minikin.",
    "strength": "Subject fidelity against prompt fidelity: 0 is the plain category, 1 as taught, up to 2.",
    "start": "Share of the timesteps before which the plain category is painted; later follows it more.",
    "end": "Share of the timesteps after which the plain category is painted.",
    "region": "Where in the image the concept may appear.",
    "box": "Instead of a region: left, top, right, bottom in percent, for example 0,20,50,100.",
    "name": "Its name in prompts, instead of the concept's own.",
    "others": "Concepts of another loading node; all of them can be named in one prompt.",
    "text": "The prompt, with concepts by their name: a photo of <tom> on the beach.",
}

concepts.register_folder()


def load(
    file: str, strength: float, start: float, end: float, region: str, box: str = "", name: str = "",
    others: tuple[ConceptInUse, ...] | None = None,
) -> tuple[ConceptInUse, ...]:  # fmt: skip
    """See `concepts.load`."""
    return concepts.load(file, strength, start, end, region, box, name, others or ())


def encode_prompt(
    model: Any, clip: Any, text: str, uses: tuple[ConceptInUse, ...]
) -> tuple[Any, list[list[Any]]]:
    """The MODEL that follows concepts, and the prompt's CONDITIONING (see `conditioning.encode`)."""
    return patched(model, uses), encode(clip, text, uses)


def changed(file: str) -> str:
    """Changes when the file does, so that ComfyUI loads a concept again that was taught anew."""
    state = concepts.path_of(file).stat()
    return f"{state.st_mtime_ns} {state.st_size}"
