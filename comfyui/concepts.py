"""Concept files on disk, and what a workflow asks of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import folder_paths

from minikin.errors import BadRecipe, UnknownName
from minikin.limits import MAX_STRENGTH
from minikin.models.regions import NAMED_BOXES, Box, parse_box
from minikin.perfusion import concept_file
from minikin.perfusion.concept import Concept

FOLDER = "minikin"  # in ComfyUI's folder of models
EVERYWHERE = "everywhere"
REGIONS = (EVERYWHERE, *NAMED_BOXES)


@dataclass(frozen=True)
class ConceptInUse:
    """A concept and how a workflow uses it.

    strength    0 to MAX_STRENGTH; at 0 the picture is the plain category's, to the bit
    start, end  shares of the timesteps between which it acts
    box         region of the image; None for all of it
    """

    concept: Concept
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    box: Box | None = None


def register_folder() -> None:
    """Let ComfyUI look for concepts in models/minikin, and where extra_model_paths.yaml says `minikin:`."""
    default = str(Path(folder_paths.models_dir) / FOLDER)
    paths, extensions = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    folder_paths.folder_names_and_paths[FOLDER] = (
        list(dict.fromkeys([*paths, default])),
        {".safetensors"} | set(extensions),
    )


def file_names() -> list[str]:
    """The concept files that ComfyUI finds."""
    return folder_paths.get_filename_list(FOLDER)


def path_of(file: str) -> Path:
    """The path of a concept file; raises UnknownName."""
    path = folder_paths.get_full_path(FOLDER, file)
    if path is None:
        raise UnknownName("concept file", file, file_names(), "Put concepts into models/minikin.")
    return Path(path)


def load(
    file: str,
    strength: float,
    start: float,
    end: float,
    region: str,
    box: str,
    name: str,
    others: tuple[ConceptInUse, ...],
) -> tuple[ConceptInUse, ...]:
    """The concepts of `others`, and one more.

    region  a name of REGIONS
    name    in prompts, instead of the concept's own; "" for that
    box     left, top, right, bottom in percent; replaces the region if it is not empty
    Raises BadConceptFile for a file that is none, BadRecipe for values out of range and a name used twice.
    """
    if not 0 <= strength <= MAX_STRENGTH:
        raise BadRecipe(f"The strength must lie between 0 and {MAX_STRENGTH:g}, but it is {strength:g}.")
    if not 0 <= start < end <= 1:
        raise BadRecipe(f"Start must come before end, both between 0 and 1; they are {start:g} and {end:g}.")
    concept = concept_file.load(path_of(file))
    concept = concept.renamed(name.strip()) if name.strip() else concept
    if any(other.concept.name == concept.name for other in others):
        raise BadRecipe(
            f"Two of the concepts are named '{concept.name}', so <{concept.name}> could mean either. Give "
            "one another name on its node."
        )
    text = box.strip() or ("" if region == EVERYWHERE else region)
    place = parse_box(text) if text else None
    return (*others, ConceptInUse(concept, strength, start, end, place))


def at(uses: tuple[ConceptInUse, ...], share: float) -> tuple[ConceptInUse, ...]:
    """Those that act at this share of the timesteps."""
    return tuple(use for use in uses if use.start <= share < use.end)
