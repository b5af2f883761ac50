"""What is printed of notes: their own words, whatever stands in them."""

from __future__ import annotations

from typing import Any

import pytest

from minikin.cli import display


@pytest.mark.parametrize("text", ["'[/x]' is not the name of a LoRA.", "cat[final].png was.", "[red]a[/]"])
def test_words_in_brackets_are_words(text: str, capsys: Any) -> None:
    display.warn(text)
    display.note(text)
    assert capsys.readouterr().err.splitlines() == [text, text]
