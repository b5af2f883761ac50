"""The command presets."""

from __future__ import annotations

from minikin.cli import display
from minikin.models.presets import PRESETS, Preset, local_file


def show(*, as_json: bool) -> None:
    """Print each preset with its adapters by architecture; `*` marks the adapters on this machine."""
    for p in PRESETS.values():
        adapters = {a: local_file(source) is not None for a, by_steps in p.adapters.items()
                 if (source := p.source(a, p.steps)) and by_steps}  # fmt: skip
        if as_json:
            display.emit({"name": p.name, "what": p.what, "steps": p.steps, "least_and_most_steps": _ends(p),
                          "guidance": p.guidance, "scheduler": p.scheduler, "adapters": adapters})  # fmt: skip
            continue
        counts = f"({p.counts})"
        guidance = "base's own" if p.guidance is None else f"{p.guidance:g}"
        bases = ", ".join(f"{a}{'*' if here else ''}" for a, here in adapters.items()) or "-"
        display.out.print(
            f"{p.name:10} {p.steps:3} steps {counts:14} guidance {guidance:10}  adapters: {bases}\n"
            f"{'':10} {p.what}",
            soft_wrap=True,
        )  # fmt: skip
    if not as_json:
        display.out.print("* on this machine; `minikin models list` shows how to get the others.")


def _ends(p: Preset) -> tuple[int, int]:
    return min(p.allowed), max(p.allowed)
