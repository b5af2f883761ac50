"""The documentation names files that exist, links that lead somewhere, and the options as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tools import options_doc

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *DOCS.glob("*.md"),
        *(p for n in ("README", "CONTRIBUTING", "SECURITY") if (p := ROOT / f"{n}.md").exists()),
    ]
)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


def test_page_of_options_is_current() -> None:
    assert options_doc.PAGE.read_text() == options_doc.page(), "run `python -m tools.options_doc`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+://|mailto:", link):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_files_of_the_architecture_page_exist() -> None:
    text = (DOCS / "architecture.md").read_text()
    names = set(re.findall(r"`((?:[\w/]+/)?\w+\.py)`", text)) - {"openai.py", "a1111.py"}
    assert len(names) > 40
    missing = [n for n in sorted(names) if not any((ROOT / p / n).exists() for p in ("", "src/minikin"))]
    assert not missing
