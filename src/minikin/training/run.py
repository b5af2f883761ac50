"""The one training loop of all stages: seeded by step, resumable, safe to kill or interrupt.

    run = Run(folder, model, plan, device=device, facts={...}, stage="judge")
    yield from run.train(loss, prepare=prepare, evaluate=evaluate, sample=sample)
    with run.averaged():
        model.save_pretrained(...)

`loss(turn, data)` returns {"loss": what is minimised, other names: only logged}; `turn` carries all
randomness of the step and the batch size, so a step depends on (seed, step) and the weights alone,
and a resumed run is bit for bit the uninterrupted one on a CPU when the budget is in steps.
`prepare(turn)` makes the CPU side of a batch one step ahead on a thread. `evaluate()` and `sample()`
are called with the averaged weights. In `folder` lie checkpoint.safetensors, log.jsonl, curve.png
and samples/. Knows nothing of any one model.

Several networks may be trained at once: one backward pass of the sum of their losses, each in a
`Group` with its own rate and clipping. Batches may be computed in pieces (`Plan.accumulation`) and
by several processes (training/distributed.py); `turn.rows` are those of the piece at hand, and `loss` must
return means over them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from minikin import events
from minikin.errors import BadRecipe, Diverged, OutOfMemory
from minikin.models import precision
from minikin.models.memory import ran_out
from minikin.training import checkpoint, distributed, muon
from minikin.training.logger import Losses, Telling, name_of
from minikin.training.metrics_log import Journal
from minikin.training.plan import SAME, Plan, State, Turn
from minikin.training.signals import interruptible

__all__ = ["Group", "Losses", "Plan", "Run", "Turn"]

MAX_SKIPS = 5  # steps in a row whose loss is not finite
MAX_ROLLBACKS = 2
SMALLEST_BATCH = 4
SHOW_EVERY = 0.2  # seconds between progress events


@dataclass(frozen=True)
class Group:
    """Parameters with a learning rate and a clipping norm of their own; `averaged` in the results."""

    parameters: list[nn.Parameter]
    rate: float
    clip: float = 1.0
    averaged: bool = True


class _NoAverage:
    """In the place of an average where none is wanted, so that no second copy of the weights is kept."""

    optimization_step = 0

    def __init__(self) -> None:
        self.shadow_params: list[Tensor] = []

    def step(self, parameters: Any) -> None: ...

    store = copy_to = restore = step


class Run:
    """Trains `model` by `plan`, from the checkpoint in `folder` if there is one.

    facts   what else must be equal to go on from a checkpoint (shapes, hashes of the data); JSON
    groups  of the model's parameters, when they do not all have the plan's rate
    Raises BadRecipe when the checkpoint belongs to another run, AssetError when it is damaged.
    """

    def __init__(
        self, folder: Path, model: nn.Module, plan: Plan, *, device: torch.device,
        facts: Mapping[str, Any] | None = None, stage: str = "training",
        groups: Sequence[Group] | None = None,
    ) -> None:  # fmt: skip
        from diffusers.training_utils import EMAModel

        self.folder, self.model, self.plan, self.device, self.stage = folder, model, plan, device, stage
        self.path = folder / "checkpoint.safetensors"
        self.ranks = distributed.current(device)
        self.journal = Journal(folder / "log.jsonl", silent=not self.ranks.first)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.groups = list(groups or [Group(trained, plan.rate, plan.clip)])
        self.parameters = [p for g in self.groups if g.averaged for p in g.parameters]
        self.optimizer = muon.Muon(
            [{"params": g.parameters} for g in self.groups],
            muon.matrices(model) if plan.optimizer == "muon" else [],
            lr=plan.rate, betas=plan.betas, weight_decay=plan.weight_decay, fused=True,
        )  # fmt: skip
        self.ema = EMAModel(self.parameters, decay=plan.ema, foreach=True) if plan.ema else _NoAverage()
        self.state = State(plan.batch)
        self.facts = {k: v for k, v in plan.model_dump(mode="json").items() if k in SAME} | dict(facts or {})
        self._after: Callable[[Turn], None] | None = None
        self._started = 0.0  # monotonic time of the last look at the clock
        self.telling = Telling(stage, folder, plan, self.journal)
        self.pieces = plan.accumulation * self.ranks.count
        if plan.batch % self.pieces:
            raise BadRecipe(
                f"A batch of {plan.batch} cannot be computed in {self.pieces} equal pieces (accumulation "
                f"times processes). Use a multiple of {self.pieces}."
            )
        self.resumed = self.path.exists()
        self.ranks.wait()  # all have looked before the first of them writes
        if self.resumed:
            self._load()

    # ---- what stages use ---------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.fraction >= 1

    @property
    def fraction(self) -> float:
        """How much of the budget is used, 0 to 1; a function of what the checkpoint stores."""
        by_steps = self.state.step / self.plan.steps if self.plan.steps else 0.0
        by_time = self.state.seconds / (60 * self.plan.minutes) if self.plan.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def autocast(self) -> torch.autocast:
        """bfloat16 over float32 weights, where the plan wants it and the device has it."""
        return precision.autocast(self.device, self.plan.bf16)

    def compiled(self, module: Any) -> Any:
        """The module for calls in `loss`; parameters stay those of the module itself."""
        return torch.compile(module) if self.plan.compile and self.device.type == "cuda" else module

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, in evaluation mode, without gradients."""
        training = self.model.training
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.ema.restore(self.parameters)
            self.model.train(training)

    def train(
        self, loss: Callable[[Turn, Any], Losses], *, prepare: Callable[[Turn], Any] | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        sample: Callable[[], Image.Image] | None = None, after: Callable[[Turn], None] | None = None,
    ) -> Iterator[events.Event]:  # fmt: skip
        """Train to the end of the budget. Ctrl-C saves, then raises KeyboardInterrupt.

        after  called when a step has changed the weights
        Raises Diverged, OutOfMemory, StorageError; the last checkpoint then stands.
        """
        if self.finished:
            yield events.Note(f"{self.stage}: already trained ({self.state.step} steps).")
            return
        if self.resumed:
            yield events.Note(f"{self.stage}: going on after step {self.state.step}.")
        else:
            self.save()  # something to go back to; also finds a full disk before the work is done
        self.journal.rewind(self.state.step)
        self.journal.write(step=self.state.step, seen=self.state.seen, device=name_of(self.device))
        self.model.train()
        with interruptible() as stop, ThreadPoolExecutor(1) as ahead:
            self._after = after
            yield from self._loop(loss, prepare, evaluate, sample, lambda: self.ranks.any(stop.is_set()), ahead)

    # ---- the loop ----------------------------------------------------------------------------

    def _loop(
        self, loss: Callable[[Turn, Any], Losses], prepare: Callable[[Turn], Any] | None,
        evaluate: Callable[[], Mapping[str, float]] | None, sample: Callable[[], Image.Image] | None,
        stopped: Callable[[], bool], ahead: ThreadPoolExecutor,
    ) -> Iterator[events.Event]:  # fmt: skip
        s, bad = self.state, 0
        self._started = time.monotonic()
        saved = sampled = s.seconds
        shown = -math.inf
        self.telling.begin(s)
        coming: tuple[Turn, Future[Any]] | None = None
        while not self.finished:
            turn = self._turn(s.step)
            if coming is None or coming[0] != turn:
                coming = (turn, ahead.submit(prepare or _nothing, turn))
            data = coming[1].result()
            coming = ((t := self._turn(s.step + 1)), ahead.submit(prepare or _nothing, t))
            try:
                losses = self._step(turn, loss, data)
            except (torch.OutOfMemoryError, RuntimeError) as e:
                yield self._smaller(e)
                continue
            s.step += 1
            self._tick()
            if losses is None:
                s.skipped += 1
                bad += 1
                if bad == MAX_SKIPS:
                    yield self._roll_back(turn.step)
                    s, bad = self.state, 0
                if not (self.finished or stopped()):
                    continue
            else:
                bad = 0
                s.seen += turn.size
                self.telling.count(losses)
            if s.step % self.plan.log_steps == 0 or self.finished:
                self.telling.write(s, self.rate)
            if losses is not None and (s.seconds - shown > SHOW_EVERY or self.finished):
                shown = s.seconds
                yield self.telling.progress(s, losses)
            if s.seconds - sampled > 60 * self.plan.sample_minutes or self.finished:
                yield from self._report(evaluate, sample)
                self._tick()
                sampled = s.seconds
            if stopped() or self.finished or s.seconds - saved > 60 * self.plan.save_minutes:
                if not checkpoint.is_finite(self.model):
                    yield self._roll_back(turn.step)
                    s = self.state
                    continue
                self.save()
                saved = s.seconds
                if stopped() and not self.finished:
                    raise KeyboardInterrupt

    def _turn(self, step: int) -> Turn:
        return Turn(step, self.state.batch, (self.plan.seed, self.state.rollbacks, step))

    def _step(self, turn: Turn, loss: Callable[[Turn, Any], Losses], data: Any) -> Losses | None:
        """One update; None when loss or gradient is not finite, and then nothing was changed."""
        torch.manual_seed(int(turn.fork(0).integers(2**62)))  # for dropout and the like
        for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = self.rate * (own.rate / self.plan.rate)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(turn, loss, data)
        norms = [nn.utils.clip_grad_norm_(g.parameters, g.clip) for g in self.groups]
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        if not math.isfinite(float(losses["loss"] + norm)):
            return None
        self.optimizer.step()
        self.ema.step(self.parameters)
        if self._after:
            self._after(turn)
        return losses | {"norm": norm}

    def _backward(self, turn: Turn, loss: Callable[[Turn, Any], Losses], data: Any) -> dict[str, Tensor]:
        """Gradients of the whole batch, over all pieces and processes; the mean of what was lost."""
        n = self.plan.accumulation
        found: dict[str, Tensor] = {}
        for k in range(n):
            piece = replace(turn, piece=self.ranks.rank * n + k, pieces=self.pieces)
            losses = loss(piece, data)
            (losses["loss"] / n).backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                found[name] = found.get(name, 0) + value.detach() / n
        gradients = [p.grad for g in self.groups for p in g.parameters if p.grad is not None]
        self.ranks.average([*gradients, *found.values()])
        return found

    @property
    def rate(self) -> float:
        """Learning rate of the coming step: warm-up in steps, constant, linear fall over `decay`."""
        p = self.plan
        rise = min(1.0, (self.state.step + 1) / p.warmup) if p.warmup else 1.0
        fall = min(1.0, (1 - self.fraction) / p.decay) if p.decay else 1.0
        return p.rate * self.state.rate * rise * max(p.floor, fall)

    def _tick(self) -> None:
        now = time.monotonic()
        self.state.seconds = self.ranks.agreed(self.state.seconds + now - self._started)
        self._started = now

    def _smaller(self, e: RuntimeError) -> events.Note:
        """After running out of memory: halve the batch (the rate stays) and try the step again."""
        if not ran_out(e):
            raise e
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = self.state.batch // 2
        if half < SMALLEST_BATCH or half % self.pieces or self.ranks.count > 1:
            raise OutOfMemory(
                f"Stage {self.stage} does not fit into the memory of {self.device}, even with a batch of "
                f"{self.state.batch}. Close other programs, or use --device cpu."
            ) from e
        self.state.batch //= 2
        return events.Note(
            f"{self.stage}: memory is short; batch {self.state.batch} from here on.", warning=True
        )

    def _report(
        self, evaluate: Callable[[], Mapping[str, float]] | None, sample: Callable[[], Image.Image] | None
    ) -> Iterator[events.Event]:  # fmt: skip
        if self.ranks.first:
            with self.averaged():
                values, image = dict(evaluate()) if evaluate else {}, sample() if sample else None
            yield from self.telling.report(self.state, values, image)

    def _roll_back(self, step: int) -> events.Note:
        now = self.state
        if now.rollbacks == MAX_ROLLBACKS:
            raise Diverged(
                f"Stage {self.stage} diverged at step {step}: the loss is not a finite number, also after "
                f"going back {MAX_ROLLBACKS} times at half the learning rate. The last good checkpoint stands: "
                f"{self.path}. To start the stage anew, delete it and choose a lower rate than "
                f"{self.plan.rate:g}."
            )
        self._load()
        s = self.state
        s.rollbacks, s.rate, s.skipped = now.rollbacks + 1, now.rate / 2, now.skipped
        s.seconds = now.seconds
        self.journal.rewind(s.step)
        self.telling.begin(s)
        self.save()
        return events.Note(
            f"{self.stage}: {MAX_SKIPS} losses in a row were not finite; back to step {s.step} at half the "
            "learning rate.",
            warning=True,
        )

    # ---- checkpoints -------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint, whole or not at all. Raises StorageError; the older one survives."""
        meta = {"state": asdict(self.state), "facts": self.facts, "averaged": self.ema.optimization_step}
        if self.ranks.first:
            checkpoint.write(self.path, self.model, self.ema.shadow_params, self.optimizer, meta)
        self.ranks.wait()

    def _load(self) -> None:
        tensors, meta = checkpoint.read(self.path)
        theirs = meta["facts"]
        differ = [k for k in {**theirs, **self.facts} if theirs.get(k) != self.facts.get(k)]
        if differ:
            k = differ[0]
            raise BadRecipe(
                f"The checkpoint {self.path} belongs to another run: {k} is {theirs.get(k)} there and "
                f"{self.facts.get(k)} here. Use the same settings, another --out, or delete it to start anew."
            )
        checkpoint.restore(self.path, tensors, self.model, self.ema.shadow_params, self.optimizer)
        self.ema.optimization_step = meta["averaged"]
        self.state = State(**meta["state"])


def _nothing(turn: Turn) -> None:
    return None
