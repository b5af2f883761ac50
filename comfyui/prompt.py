"""Prompts that name concepts: `a photo of <tom> on the beach`. Everything else is ComfyUI's own syntax."""

from __future__ import annotations

import re
from collections.abc import Mapping

from minikin.errors import BadRecipe, UnknownName
from minikin.models.articles import agreeing, article, needs_article
from minikin.models.prompt import ConceptUse, Prompt
from minikin.perfusion.concept import NAME

from .concepts import ConceptInUse

_TAG = re.compile(r"<([^<>\n]*)>")
_CONTEXT = 100  # characters before a name that decide about its article


def read(text: str, concepts: Mapping[str, ConceptInUse]) -> Prompt:
    """The prompt with categories in place of concepts, and where they are.

    As in Minikin, an article goes before a category that needs one. Raises UnknownName for a name that no
    concept has, and BadRecipe for a strength or region inside the brackets, which belong to the loading node.
    """
    out, uses, end, length = [], [], 0, 0
    for tag in _TAG.finditer(text):
        name = re.split("[:@]", tag[1])[0]
        if name not in concepts:
            if NAME.fullmatch(tag[1]):
                raise UnknownName("concept", tag[1], concepts)
            continue  # of another node
        if name != tag[1]:
            raise BadRecipe(
                f"'{tag[0]}' has more than a name. Strength and region are set where the concept is loaded; "
                f"write <{name}>."
            )
        use = concepts[name]
        category = use.concept.category
        before = agreeing(text[end : tag.start()], category)
        context = "".join([*out[-2:], before])[-_CONTEXT:]
        before += f"{article(category)} " if needs_article(context) else ""
        out += [before, category]
        start = length + len(before)
        length = start + len(category)
        end = tag.end()
        uses.append(ConceptUse(name, use.strength, start, length, has_strength=True, box=use.box))
    return Prompt(text, "".join([*out, text[end:]]), tuple(uses))
