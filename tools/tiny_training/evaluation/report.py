"""Report of an evaluation: shares of correct images with intervals, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tools.tiny_training.evaluation.prompts import PromptSpec
from tools.tiny_training.evaluation.rules import BARS

from minikin.evaluation.intervals import Estimate, wilson_share

Rights = Sequence[Mapping[str, bool]]  # of each image: result by rule


@dataclass(frozen=True)
class Report:
    """Shares of correct images by rule, for generated images and for the world's images (upper bound)."""

    settings: Mapping[str, Any]
    drawn: Mapping[str, Estimate]  # word: JSON key
    ceiling: Mapping[str, Estimate]
    by_category: Mapping[str, Estimate]
    by_background: Mapping[str, Estimate]
    captions: tuple[float | None, float | None]  # caption accuracy among 50: generated, upper bound
    psnr: Estimate
    v_loss: Estimate
    v_quarters: tuple[float, ...]
    times: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """The tables, as printed."""
        lines = [f"{'bar':<12}{'generated images, 95 % interval':<36}upper bound: the world's images"]
        lines += [f"{b:<12}{m.percent():<36}{self.ceiling[b].percent()}" for b, m in self.drawn.items()]
        caption_shares = ["      -" if c is None else f"{100 * c:5.1f} %" for c in self.captions]
        lines += [f"{'caption':<12}{caption_shares[0] + ' best of 50':<36}{caption_shares[1]}", ""]
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


def shares(rights: Rights) -> dict[str, Estimate]:
    """Share of correct images by rule, over those it applies to."""
    out = {}
    for bar in BARS:
        results = [r[bar] for r in rights if bar in r]
        if results:
            out[bar] = wilson_share(sum(results), len(results))
    return out


def by_category(results: Sequence[PromptSpec], rights: Rights) -> dict[str, Estimate]:
    """Share of correct images by the rule `object`, for each category."""
    return _grouped([a.things[0].category if a.things else "" for a in results], rights, "object")


def by_background(specs: Sequence[PromptSpec], rights: Rights) -> dict[str, Estimate]:
    """Share of correct images by the rule `background`, for each background."""
    return _grouped([a.background or "" for a in specs], rights, "background")


def _grouped(names: Sequence[str], rights: Rights, bar: str) -> dict[str, Estimate]:
    out: dict[str, list[bool]] = {}
    for name, right in zip(names, rights, strict=True):
        if name and bar in right:
            out.setdefault(name, []).append(right[bar])
    return {name: wilson_share(sum(v), len(v)) for name, v in out.items()}
