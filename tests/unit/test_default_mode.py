"""The default edit: the published method for every base but tiny."""

from __future__ import annotations

import pytest

from minikin.recipes import Teach


@pytest.mark.parametrize("base", ["sd15", "sd21", "sdxl", "dreamshaper", "org/model"])
def test_published_method_is_the_default(base: str) -> None:
    """With the hyper-parameters of the paper (arXiv:2305.01644)."""
    recipe = Teach.make(name="tom", category="cat", base=base)
    assert (recipe.mode, recipe.value_lr, recipe.word_lr, recipe.prior_weight) == ("gated", 0.03, 0.006, 0)
    assert (recipe.beta, recipe.tau, recipe.max_steps) == (0.75, 0.1, 400)


def test_value_only_edit_is_the_default_on_tiny() -> None:
    for options in ({}, {"base": "tiny"}, {"base": None, "mode": None}):
        recipe = Teach.make(name="tom", category="cat", **options)
        assert (recipe.mode, recipe.value_lr, recipe.prior_weight, recipe.max_steps) == ("value", 0.1, 0.2, 300)


def test_mode_can_be_chosen_for_any_base() -> None:
    assert Teach.make(name="tom", category="cat", base="sd15", mode="value").value_lr == 0.1
    assert Teach.make(name="tom", category="cat", mode="gated").value_lr == 0.03
    assert Teach.make(name="tom", category="cat", base="sd15", value_lr=0.5, keep=1).prior_weight == 1
