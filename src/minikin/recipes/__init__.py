"""Recipes: the options of every command, with their defaults, as validated data.

The same models drive the options of the command line, the HTTP schema, the page's forms and the JSON in image
metadata. A recipe is validated when it is built; `BadRecipe` names the first problem in one sentence.
"""

from __future__ import annotations

from minikin.recipes.base import (
    MAX_SIDE,
    MAX_STEPS,
    N_TRAIN,
    WHOLE,
    FilterMode,
    MaskKind,
    Recipe,
    Scale,
    Share,
    Shares,
    Softness,
    Span,
    Spans,
    Strength,
    first_sentence,
)
from minikin.recipes.baseline import PUBLISHED_BASELINES, TINY_BASELINES, Baseline, BaselineMethod
from minikin.recipes.distill import PUBLISHED, STUDENT_TIMES, TINY, Distill, Method
from minikin.recipes.evaluation import SECOND_NAME, Best, Compare, Sweep
from minikin.recipes.img2img import PRESET_OPTIONS, Img2Img, Inpaint, Refine
from minikin.recipes.paint import BackendName, ConceptSettings, KeyLock, Paint
from minikin.recipes.teach import Teach

__all__ = [
    "MAX_SIDE",
    "MAX_STEPS",
    "N_TRAIN",
    "PRESET_OPTIONS",
    "PUBLISHED",
    "PUBLISHED_BASELINES",
    "SECOND_NAME",
    "STUDENT_TIMES",
    "TINY",
    "TINY_BASELINES",
    "WHOLE",
    "BackendName",
    "Baseline",
    "BaselineMethod",
    "Best",
    "Compare",
    "ConceptSettings",
    "Distill",
    "FilterMode",
    "Img2Img",
    "Inpaint",
    "KeyLock",
    "MaskKind",
    "Method",
    "Paint",
    "Recipe",
    "Refine",
    "Scale",
    "Share",
    "Shares",
    "Softness",
    "Span",
    "Spans",
    "Strength",
    "Sweep",
    "Teach",
    "first_sentence",
]
