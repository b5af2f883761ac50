"""Training logger: mean losses, progress events, evaluations, samples and the learning curve of one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from minikin import events
from minikin.images.encode import save_image
from minikin.training.config import TrainerState, TrainingConfig
from minikin.training.metrics_log import MetricsLog, curve

Losses = Mapping[str, Tensor]


class TrainingLogger:
    """Averages the losses between two lines of the metrics log; `folder` None, or `silent`: writes no file."""

    def __init__(
        self, stage: str, folder: Path | None, config: TrainingConfig, *, silent: bool = False
    ) -> None:  # fmt: skip
        self.stage, self.folder, self.config = stage, folder, config
        self.metrics_log = MetricsLog(folder / "log.jsonl" if folder and not silent else None)
        self._sums: dict[str, Tensor] = {}
        self._last = (0, 0.0)  # examples and seconds at the last line of the log

    def begin(self, s: TrainerState, device: str) -> None:
        """The first line of a run, or of its continuation."""
        self.rewind(s)
        self.metrics_log.write(step=s.step, seen=s.seen, device=device)

    def rewind(self, s: TrainerState) -> None:
        """Drop the lines after this state: these steps come again."""
        self.metrics_log.rewind(s.step)
        self._last, self._sums = (s.seen, s.seconds), {}

    def add(self, losses: Losses) -> None:
        """Count the losses of one step."""
        for k, v in losses.items():
            self._sums[k] = self._sums.get(k, torch.zeros_like(v)) + v
        self._sums["n"] = self._sums.get("n", torch.zeros(())) + 1

    def write(self, s: TrainerState, lr: float) -> None:
        """The means since the last line, if there was a step."""
        if not self._sums:
            return
        n = float(self._sums.pop("n"))
        means = {k: float(f"{float(v) / n:.5g}") for k, v in self._sums.items()}
        examples, seconds = self._last
        speed = round((s.seen - examples) / max(s.seconds - seconds, 1e-9), 1)
        self._last, self._sums = (s.seen, s.seconds), {}
        self.metrics_log.write(
            step=s.step, seen=s.seen, seconds=round(s.seconds, 1), lr=lr, speed=speed, **means
        )  # fmt: skip

    def progress(self, s: TrainerState, losses: Losses) -> events.Progress:
        """Progress of the budget, steps or minutes, that is nearer its end."""
        c = self.config
        info = f"loss {float(losses['loss']):.4f}  {s.seen / max(s.seconds, 1e-9):.0f}/s"
        if c.steps and (not c.minutes or s.step / c.steps >= s.seconds / (60 * c.minutes)):
            return events.Progress(self.stage, s.step, c.steps, info)
        return events.Progress(self.stage, round(s.seconds), round(60 * (c.minutes or 0)), info)

    def evaluation(self, s: TrainerState, values: Mapping[str, float]) -> None:
        """A line of the log."""
        self.metrics_log.write(step=s.step, seen=s.seen, evaluation=values)

    def report(
        self, s: TrainerState, values: Mapping[str, float], image: Image.Image | None
    ) -> Iterator[events.Event]:
        """An evaluation and a sample, as events and files, and the curve so far."""
        if values:
            self.evaluation(s, values)
            text = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
            yield events.Note(f"{self.stage}: step {s.step}, {s.seconds / 60:.1f} min, {text}")
        if image:
            if self.folder:
                save_image(image, self.folder / "samples" / f"{s.step:07d}.png")
            yield events.ImageReady(image, f"{self.stage} at step {s.step}")
        if self.folder:
            curve(self.metrics_log.rows(), self.folder / "curve.png", self.stage)


def device_name(device: torch.device) -> str:
    """The device as a model card names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type
