"""A hook of MkDocs: links from docs/ to other files of the checkout become their paths in the built pages.

On the repository's own pages such links work as they are. A link to a file that does not exist fails the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `[text](../path)` by `text (path)`. Raises FileNotFoundError."""

    def replace(match: re.Match[str]) -> str:
        text, path = match[1], match[2]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"docs/ links to {path}, which does not exist")
        return text if f"`{path}`" == text else f"{text} (`{path}`)"

    return _OUTSIDE.sub(replace, markdown)
