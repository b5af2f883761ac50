"""The one loop: seeded, resumable bit for bit, safe to interrupt, stops by itself.

Every step draws its randomness from (seed, step) alone, so a resumed run repeats exactly what an
uninterrupted one would have done. A fixed evaluation batch (same photos, noise and timesteps
every time) decides when teaching has converged and which step was best (DVAR: Voronov et al.
2023, arXiv:2302.04841). A step whose loss is not finite is skipped, three in a row are rolled back
to the last good state at half the rate, and two roll-backs end in a clear failure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minikin.errors import BadRecipe, Diverged
from minikin.files import atomic_write
from minikin.perfusion.objective import Batch, Student

EVAL_EVERY = 10  # steps
WINDOW = 6  # evaluations looked back on
FLAT = 0.004  # relative gain over the window below which teaching has converged
MAX_SKIPS = 3
FP16_SCALE = 2.0**14  # of the loss: gradients of a mean over 10^5 numbers vanish in float16
MAX_ROLLBACKS = 2


class Step(NamedTuple):
    """What one step did: its number (1 is the first), loss, and the last evaluation."""

    step: int
    loss: float
    evaluation: float | None
    converged: bool


@dataclass
class Progress:
    """Everything about a run besides the student's tensors; goes into the checkpoint as JSON."""

    step: int = 0
    best_step: int = 0
    best: float = math.inf
    history: list[float] = field(default_factory=list)
    rate: float = 1.0
    rollbacks: int = 0
    skipped: int = 0


class Loop:
    """Teaches a student until it converges or reaches `max_steps`.

    batch_at     step -> Batch, from a seed that depends on the step alone
    evaluation   the fixed batches
    """

    def __init__(
        self, student: Student, batch_at: Callable[[int], Batch], evaluation: list[Batch], *,
        max_steps: int, fixed: bool = False,
    ) -> None:  # fmt: skip
        self.student, self.batch_at, self.evaluation = student, batch_at, evaluation
        self.max_steps, self.fixed = max_steps, fixed
        self.optimizer = torch.optim.AdamW(student.groups(), betas=(0.9, 0.999), weight_decay=0.0)
        self.rates = [g["lr"] for g in self.optimizer.param_groups]
        self.progress = Progress()
        self.best = student.state()
        self.good: tuple[dict[str, Tensor], dict[str, Any], int] | None = None

    def __iter__(self) -> Iterator[Step]:
        p = self.progress
        bad = 0
        while p.step < self.max_steps and not self.converged():
            if self.good is None or p.step % EVAL_EVERY == 0:
                self._remember()
            loss = self._step()
            if loss is None:
                bad += 1
                p.skipped += 1
                if bad >= MAX_SKIPS:
                    self._roll_back()
                    bad = 0
                else:
                    p.step += 1
                continue
            bad = 0
            p.step += 1
            evaluation = None
            if p.step % EVAL_EVERY == 0 or p.step == self.max_steps:
                evaluation = self._evaluate()
            yield Step(p.step, loss, evaluation, self.converged())

    def converged(self) -> bool:
        """Whether the last WINDOW evaluations gained less than FLAT of the best before them."""
        h = self.progress.history
        if self.fixed or len(h) <= 2 * WINDOW:
            return False
        before, now = min(h[:-WINDOW]), min(h[-WINDOW:])
        return now > before * (1 - FLAT)

    def finish(self) -> None:
        """Give the student the best state that was seen (all of it, when steps were fixed)."""
        if not self.fixed and self.progress.best_step:
            self.student.restore(self.best)

    def _step(self) -> float | None:
        loss, e_concept = self.student.loss(self.batch_at(self.progress.step))
        if not torch.isfinite(loss):
            return None
        self.optimizer.zero_grad(set_to_none=True)
        scale = FP16_SCALE if self.student.base.dtype is torch.float16 else 1.0
        (scale * loss).backward()  # type: ignore[no-untyped-call]
        grads = [q.grad for g in self.optimizer.param_groups for q in g["params"] if q.grad is not None]
        if not all(bool(torch.isfinite(g).all()) for g in grads):
            return None
        for g in grads:
            g /= scale
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.progress.rate
        self.optimizer.step()
        self.student.averaged(e_concept)
        return float(loss.detach()) if self.student.is_finite() else None

    @torch.no_grad()
    def _evaluate(self) -> float:
        losses = [float(self.student.loss(b)[0]) for b in self.evaluation]
        value = sum(losses) / len(losses)
        p = self.progress
        p.history.append(value)
        if value < p.best:
            p.best, p.best_step, self.best = value, p.step, self.student.state()
        return value

    def _remember(self) -> None:
        if self.student.is_finite():
            self.good = (self.student.state(), _copied(self.optimizer.state_dict()), self.progress.step)

    def _roll_back(self) -> None:
        p = self.progress
        p.rollbacks += 1
        if p.rollbacks > MAX_ROLLBACKS or self.good is None:
            raise Diverged(
                f"Teaching diverged at step {p.step + 1}: the loss is not a finite number, also after going "
                "back and halving the learning rate. Try --value-rate 0.01, --dtype float32, or other photos."
            )
        state, optimizer, _ = self.good
        self.student.restore(state)
        self.optimizer.load_state_dict(_copied(optimizer))
        p.rate /= 2
        p.step += 1

    # ---- checkpoints -------------------------------------------------------------------------

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """One safetensors file with everything needed to go on; tensors and JSON, no pickle."""
        from safetensors.torch import save

        self._remember()  # a resumed run rolls back to here, and so must this one

        tensors = {f"student.{k}": v for k, v in self.student.state().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        moments = self.optimizer.state_dict()["state"]
        for i, s in moments.items():
            tensors |= {f"optimizer.{i}.{k}": v.cpu().clone() for k, v in s.items()}
        meta = {"progress": json.dumps(self.progress.__dict__), "facts": json.dumps(facts)}
        atomic_write(path, save(tensors, meta))

    def resume(self, path: Path, facts: dict[str, Any]) -> None:
        """Go on from a checkpoint; raises BadRecipe when it belongs to another run."""
        tensors, meta = read_checkpoint(path)
        theirs = json.loads(meta["facts"])
        differ = [k for k in facts if theirs.get(k) != facts[k]]
        if differ:
            raise BadRecipe(
                f"The checkpoint {path} belongs to another run ({', '.join(differ)} differ). Use the same "
                "settings to resume, or another --out to start anew."
            )
        self.progress = Progress(**json.loads(meta["progress"]))
        self.student.restore(_under(tensors, "student."))
        self.best = _under(tensors, "best.")
        state = self.optimizer.state_dict()
        flat = _under(tensors, "optimizer.")
        for key, value in flat.items():
            i, name = key.split(".", 1)
            state["state"].setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict(state)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    try:
        with safe_open(path, "pt") as f:
            meta = dict(f.metadata() or {})
        return load(path.read_bytes()), meta
    except (OSError, SafetensorError) as e:
        raise BadRecipe(f"The checkpoint {path} cannot be read ({e}); start anew without --resume.") from e


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    from copy import deepcopy

    return deepcopy(state)
