"""What a run says while it trains: means for the log, progress, evaluations, samples and the curve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minikin import events
from minikin.images.encode import save_image
from minikin.training.metrics_log import Journal, curve
from minikin.training.plan import Plan, State

Losses = Mapping[str, Tensor]


class Telling:
    """Collects the losses of one stage between two lines of its log."""

    def __init__(self, stage: str, folder: Path, plan: Plan, journal: Journal) -> None:
        self.stage, self.folder, self.plan, self.journal = stage, folder, plan, journal
        self._sums: dict[str, Tensor] = {}
        self._since = (0, 0.0)  # seen and seconds at the last line of the log

    def begin(self, s: State) -> None:
        """Forget what was counted: a line begins here."""
        self._since, self._sums = (s.seen, s.seconds), {}

    def count(self, losses: Losses) -> None:
        for k, v in losses.items():
            self._sums[k] = self._sums.get(k, torch.zeros_like(v)) + v
        self._sums["n"] = self._sums.get("n", torch.zeros(())) + 1

    def write(self, s: State, rate: float) -> None:
        """The means since the last line, if anything was counted."""
        if not self._sums:
            return
        n = float(self._sums.pop("n"))
        means = {k: float(f"{float(v) / n:.5g}") for k, v in self._sums.items()}
        seen, seconds = self._since
        speed = (s.seen - seen) / max(s.seconds - seconds, 1e-9)
        self.begin(s)
        known = {"step": s.step, "seen": s.seen, "seconds": round(s.seconds, 1), "rate": rate}
        self.journal.write(**known, speed=round(speed, 1), **means)

    def progress(self, s: State, losses: Losses) -> events.Progress:
        """Of the budget that is nearer its end."""
        p = self.plan
        info = f"loss {float(losses['loss']):.4f}  {s.seen / max(s.seconds, 1e-9):.0f}/s"
        if p.steps and (not p.minutes or s.step / p.steps >= s.seconds / (60 * p.minutes)):
            return events.Progress(self.stage, s.step, p.steps, info)
        return events.Progress(self.stage, round(s.seconds), round(60 * (p.minutes or 0)), info)

    def report(
        self, s: State, values: Mapping[str, float], image: Image.Image | None
    ) -> Iterator[events.Event]:
        """An evaluation and a sample into log and folder; the curve so far."""
        if values:
            self.journal.write(step=s.step, seen=s.seen, evaluation=values)
            shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
            yield events.Note(f"{self.stage}: step {s.step}, {s.seconds / 60:.1f} min, {shown}")
        if image:
            save_image(image, self.folder / "samples" / f"{s.step:07d}.png")
            yield events.Picture(image, f"{self.stage} at step {s.step}")
        curve(self.journal.rows(), self.folder / "curve.png", self.stage)


def name_of(device: torch.device) -> str:
    """What a model card calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type
