"""Evaluation prompts of sweeps and comparisons: built-in scenes, or a file with one prompt a line."""

from __future__ import annotations

from pathlib import Path

from minikin.errors import BadRecipe
from minikin.recipes import Compare, Sweep

# Places alone are followed at almost any strength; another thing and its side are what a strong concept
# forgets. In words that the embedded model knows, too.
SCENES = (
    "in the snow", "and a rocket in the forest", "at night", "to the left of a robot in the desert",
    "in the forest", "and a teapot on the beach", "on a blue background",
    "to the right of a mushroom in the snow", "in the desert", "and a soccer ball at night",
    "on a pink background", "to the left of a sailboat in the city", "on the beach",
    "and a cactus in a meadow", "in the city", "to the right of a guitar in a room", "in a meadow",
    "and a penguin in the snow", "in a room", "to the left of a chair on the beach", "on a green background",
    "and a car in the city", "on a yellow background", "on a white background",
)  # fmt: skip
PLACES = tuple(s for s in SCENES if s.split()[0] in ("in", "on", "at"))  # scenes without another thing


def prompt_templates(recipe: Sweep | Compare, category: str) -> tuple[str, ...]:
    """The recipe's number of prompts, with {} in place of the subject; none contains its category again.

    Raises BadRecipe when there are too few, or for a file that cannot be read.
    """
    if recipe.texts is None:
        templates = [f"a photo of {{}} {scene}" for scene in SCENES if f"a {category} " not in scene]
        source = "built-in scenes"
    else:
        templates, source = _read(Path(recipe.texts)), f"prompts in {recipe.texts}"
    if len(templates) < recipe.prompts:
        raise BadRecipe(
            f"--prompts asks for {recipe.prompts} prompts, but there are {len(templates)} {source}. Give a "
            "file with more of them, one a line, with --texts, or ask for fewer."
        )
    return tuple(templates[: recipe.prompts])


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadRecipe(f"The prompts {path} cannot be read ({e}).") from e
    templates = list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#")))
    wrong = [line for line in templates if line.count("{}") != 1]
    if wrong:
        raise BadRecipe(
            f'In {path}, write {{}} once in place of the subject; the line "{wrong[0][:60]}" does not.'
        )
    return templates
