"""What an evaluation found, as numbers, as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tools.tiny_training.evaluation.prompts import Asked
from tools.tiny_training.evaluation.rules import BARS

from minikin.evaluation.intervals import Measured, share

Rights = Sequence[Mapping[str, bool]]  # for each image, the bars it was asked and whether it was right


@dataclass(frozen=True)
class Report:
    """Shares by bar for drawn images and for the world's own scenes of the same prompts."""

    settings: Mapping[str, Any]
    drawn: Mapping[str, Measured]
    ceiling: Mapping[str, Measured]
    by_category: Mapping[str, Measured]
    by_background: Mapping[str, Measured]
    captions: tuple[float | None, float | None]  # own caption best of 50 by the judge: drawn, ceiling
    psnr: Measured
    v_loss: Measured
    v_quarters: tuple[float, ...]
    times: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """The tables, as printed."""
        lines = [f"{'bar':<12}{'drawn pictures, 95 % interval':<36}ceiling: the world's own scenes"]
        lines += [f"{b:<12}{m.percent():<36}{self.ceiling[b].percent()}" for b, m in self.drawn.items()]
        own = ["      -" if c is None else f"{100 * c:5.1f} %" for c in self.captions]
        lines += [f"{'caption':<12}{own[0] + ' best of 50, by the judge':<36}{own[1]}", ""]
        p, v = self.psnr, self.v_loss
        quarters = " ".join(f"{q:.3f}" for q in self.v_quarters)
        lines += [
            f"autoencoder {p.value:.2f} dB [{p.low:.2f}, {p.high:.2f}] on {p.n} held-out scenes",
            f"v-loss {v.value:.4f} [{v.low:.4f}, {v.high:.4f}]; by quarter, least noise first: {quarters}",
            *(f"{name} {value:.4g}" for name, value in self.times.items()),
        ]
        for title, rows in (("object, by category", self.by_category), ("background", self.by_background)):
            ordered = sorted(rows.items(), key=lambda r: r[1].value)
            lines += ["", title, *(f"  {name:<14}{m.percent()}" for name, m in ordered)]
        return "\n".join(lines)


def shares(rights: Rights) -> dict[str, Measured]:
    """Share of right images by bar, over those that were asked."""
    out = {}
    for bar in BARS:
        asked = [r[bar] for r in rights if bar in r]
        if asked:
            out[bar] = share(sum(asked), len(asked))
    return out


def by_category(asked: Sequence[Asked], rights: Rights) -> dict[str, Measured]:
    """The bar `object` for each category."""
    return _grouped([a.things[0].category if a.things else "" for a in asked], rights, "object")


def by_background(asked: Sequence[Asked], rights: Rights) -> dict[str, Measured]:
    """The bar `background` for each background."""
    return _grouped([a.background or "" for a in asked], rights, "background")


def _grouped(names: Sequence[str], rights: Rights, bar: str) -> dict[str, Measured]:
    out: dict[str, list[bool]] = {}
    for name, right in zip(names, rights, strict=True):
        if name and bar in right:
            out.setdefault(name, []).append(right[bar])
    return {name: share(sum(v), len(v)) for name, v in out.items()}
