"""The page's theme: Gradio's base theme with Minikin's colours and local fonts; page.css adds the rest.

Nothing is fetched from other hosts; Gradio's usual themes load their fonts from Google.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

WEB = Path(__file__).parent / "static"
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")


def theme() -> Any:
    """The theme, without web fonts."""
    import gradio as gr

    plain = gr.themes.Base(primary_hue="orange", neutral_hue="stone", font=SANS, font_mono=MONO)
    return plain.set(
        body_background_fill="var(--paper)", body_background_fill_dark="var(--paper)",
        body_text_color="var(--ink)", body_text_color_dark="var(--ink)",
        block_background_fill="transparent", block_background_fill_dark="transparent",
        block_border_width="0px", block_shadow="none",
    )  # fmt: skip


def section(name: str) -> str:
    """The markup of one section."""
    return (WEB / f"{name}.html").read_text()
