"""Recipes: everything one run was asked for, as data. Every default lives here.

The same models drive the command line's flags, the HTTP schema, the page's forms and the JSON
inside images. A recipe is checked when it is made; what is wrong is said in one sentence.
"""

from __future__ import annotations

from minikin.recipes.base import (
    MAX_SIDE,
    MAX_STEPS,
    N_TRAIN,
    WHOLE,
    MaskKind,
    Mode,
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
from minikin.recipes.judge import BESIDE, Best, Compare, Sweep
from minikin.recipes.paint import EngineName, KeyLock, Paint, Tuned
from minikin.recipes.rework import OF_PRESET, Inpaint, Refine, Rework
from minikin.recipes.teach import Teach

__all__ = [
    "BESIDE",
    "MAX_SIDE",
    "MAX_STEPS",
    "N_TRAIN",
    "OF_PRESET",
    "PUBLISHED",
    "PUBLISHED_BASELINES",
    "STUDENT_TIMES",
    "TINY",
    "TINY_BASELINES",
    "WHOLE",
    "Baseline",
    "BaselineMethod",
    "Best",
    "Compare",
    "Distill",
    "EngineName",
    "Inpaint",
    "KeyLock",
    "MaskKind",
    "Method",
    "Mode",
    "Paint",
    "Recipe",
    "Refine",
    "Rework",
    "Scale",
    "Share",
    "Shares",
    "Softness",
    "Span",
    "Spans",
    "Strength",
    "Sweep",
    "Teach",
    "Tuned",
    "first_sentence",
]
