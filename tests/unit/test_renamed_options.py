"""Options that have another name since this version are still understood, and say so once."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal

import pytest
import typer
from pydantic import Field, model_validator
from typer.testing import CliRunner

from minikin.cli.flags import with_recipe
from minikin.errors import BadRecipe
from minikin.recipes import Recipe
from minikin.recipes.base import _WARNED, RenamedOption


class Fry(Recipe):
    RENAMED: ClassVar = {"heat": "temperature", "crispy": "crisp"}
    RENAMED_VALUES: ClassVar = {"fat": {"grease": "butter"}}

    temperature: float = Field(180.0, ge=0, description="degrees")
    crisp: bool = Field(True, description="until it is brown")
    fat: Literal["oil", "butter"] = Field("oil", description="what is in the pan")
    speed: float = 1.0

    @model_validator(mode="before")
    @classmethod
    def _default_by_fat(cls, values: Any) -> Any:
        """Sees present names alone, as every validator of a recipe does."""
        return {"speed": 2.0, **values} if values.get("fat") == "butter" else values


@pytest.fixture(autouse=True)
def _no_warning_yet() -> None:
    _WARNED.clear()


def test_old_name_is_read_and_warns_once() -> None:
    with pytest.warns(
        RenamedOption, match="'heat' is called 'temperature' since 0.2; the old name works in 0.2"
    ):
        assert Fry.make(heat=90).temperature == 90
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Fry.make(heat=80).temperature == 80
        assert Fry.make(temperature=70).temperature == 70


def test_old_value_is_read_before_other_validators() -> None:
    with pytest.warns(RenamedOption, match="'fat grease' is called 'fat butter'"):
        recipe = Fry.make(fat="grease")
    assert (recipe.fat, recipe.speed) == ("butter", 2.0)


def test_old_and_new_name_together_are_refused() -> None:
    with pytest.raises(BadRecipe, match="Give temperature alone: heat is its name"):
        Fry.make(heat=1, temperature=2)


def test_old_name_is_checked_like_the_new() -> None:
    with pytest.warns(RenamedOption), pytest.raises(BadRecipe, match="temperature: must be at least 0"):
        Fry.make(heat=-1)
    with pytest.raises(BadRecipe, match="warmth"):
        Fry.make(warmth=1)


def test_records_are_read_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Fry.current({"heat": 1, "fat": "grease", "other": 2}) == {
            "temperature": 1, "fat": "butter", "other": 2,
        }  # fmt: skip
        assert Fry.current({"heat": 1, "temperature": 2}) == {"temperature": 2}
    assert {"heat", "temperature"} <= Fry.option_names()


def test_assignment_is_validated() -> None:
    recipe = Fry.make()
    recipe.temperature = 5
    with pytest.raises(ValueError, match="greater"):
        recipe.temperature = -5


def test_command_line_takes_old_options() -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @with_recipe(Fry)
    def fry(*, values: dict[str, Any]) -> None:
        print(Fry.make(**values).model_dump_json())

    run = CliRunner().invoke
    result = run(app, ["--heat", "90", "--no-crispy"])
    assert '"temperature":90.0,"crisp":false' in result.stdout
    assert "'--heat' is called '--temperature' since 0.2" in result.stderr
    assert '"temperature":70.0' in run(app, ["--temperature", "70"]).stdout
    assert isinstance(run(app, ["--heat", "1", "--temperature", "2"]).exception, BadRecipe)
    assert run(app, ["--fat", "lard"]).exit_code == 2
    assert '"fat":"butter"' in run(app, ["--fat", "butter"]).stdout
    result = run(app, ["--fat", "grease"])
    assert '"fat":"butter"' in result.stdout
    assert "'--fat grease' is called '--fat butter' since 0.2" in result.stderr
    text = run(app, ["--help"], env={"COLUMNS": "100", "TERM": "dumb"}).stdout
    assert "--heat" not in text and "grease" not in text and "oil|butter" in text
