"""The training loop: seeded by step, resumable bit for bit, safe to kill or interrupt.

    trainer = Trainer(folder, model, config, device=device, facts={...}, stage="text")
    yield from trainer.train(loss, prepare=prepare, evaluate=evaluate, sample=sample)
    with trainer.averaged_weights():
        model.save_pretrained(...)

`loss(ctx, data)` returns {"loss": the scalar to minimise, other names: only logged}. The `StepContext` carries
all randomness of the step and the batch size, so a step depends on (seed, step) and the weights alone, and a
resumed run is bit for bit the uninterrupted one on a CPU when the budget is in steps. `prepare(ctx)` makes
the CPU side of a batch one step ahead on a thread. `evaluate()` and `sample()` are called with the averaged
weights. In `folder` lie checkpoint.safetensors, log.jsonl, curve.png and samples/.

Several networks may be trained at once: one backward pass of the sum of their losses, each in a `ParamGroup`
with its learning rate and clipping. Batches may be computed in micro-batches (`TrainingConfig.accumulation`)
and by several processes (training/distributed.py); `loss` must return means over `ctx.rows`.

Concepts, baselines, distillation and the stages of tiny are all trained by this loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from minikin import events
from minikin.errors import BadRecipe, Diverged, OutOfMemory
from minikin.models import precision
from minikin.models.memory import is_out_of_memory
from minikin.training import checkpoint, distributed, ema, muon
from minikin.training.config import IDENTITY, StepContext, TrainerState, TrainingConfig
from minikin.training.logger import Losses, TrainingLogger, device_name
from minikin.training.metrics_log import MetricsLog
from minikin.training.prefetch import Prefetch, Prepare
from minikin.training.signals import interruptible

__all__ = ["Losses", "ParamGroup", "StepContext", "Trainer", "TrainingConfig"]

CHECKPOINT = "checkpoint.safetensors"
MAX_SKIPS = 5  # steps in a row whose loss or gradient is NaN or Inf
MAX_ROLLBACKS = 2
SMALLEST_BATCH = 4

Loss = Callable[[StepContext, Any], Losses]
Evaluate = Callable[[], Mapping[str, float]]
Sample = Callable[[], Image.Image]
After = Callable[[StepContext], None]


@dataclass(frozen=True)
class ParamGroup:
    """Parameters with their learning rate and largest norm of the gradient; `ema`: averaged in the results."""

    parameters: Sequence[nn.Parameter]
    lr: float
    clip: float | None = 1.0
    ema: bool = True


class Trainer:
    """One training run of one model.

    folder      for the checkpoint, the metrics log and samples; None logs nothing
    facts       what else must be equal for a checkpoint to be continued: data, base, recipe
    stage       what is trained, for messages
    groups      what the optimizer trains; by default every parameter that asks for a gradient
    path        the checkpoint [checkpoint.safetensors in `folder`]; without both it is kept in memory
    resume      whether a checkpoint at `path` is continued, or replaced
    former_facts  facts that earlier versions wrote in place of some of `facts`, and that depend on the machine:
                of their checkpoints, those that differ are listed in `unverified`, and none is refused for them

    Raises BadRecipe when the checkpoint belongs to another run, AssetError when it is damaged.
    """

    def __init__(
        self, folder: Path | None, model: nn.Module, config: TrainingConfig, *, device: torch.device,
        facts: Mapping[str, Any] | None = None, stage: str = "training",
        groups: Sequence[ParamGroup] | None = None, path: Path | None = None, resume: bool = True,
        former_facts: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.config, self.device, self.stage = model, config, device, stage
        self.path = folder / CHECKPOINT if folder and not path else path
        self.ranks = distributed.current(device)
        self.logger = TrainingLogger(stage, folder, config, silent=not self.ranks.is_first)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.groups = list(groups or [ParamGroup(trained, config.lr, config.clip)])
        self.averaged = [p for g in self.groups if g.ema for p in g.parameters]
        self.optimizer = muon.Muon(
            [{"params": list(g.parameters)} for g in self.groups],
            muon.matrices(model) if config.optimizer == "muon" else [],
            lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=config.fused or None,
        )  # fmt: skip
        self.ema = ema.make(self.averaged, config.ema)
        self.state = TrainerState(config.batch)
        self.best: dict[str, Tensor] = {}
        self.facts = config.model_dump(mode="json", include=IDENTITY) | dict(facts or {})
        self.former_facts = dict(former_facts or {})
        self.unverified: list[str] = []
        self.interrupted = False
        self._memory: tuple[dict[str, Tensor], dict[str, Any]] | None = None  # the checkpoint without a path
        self._clock = 0.0  # monotonic time up to which `state.seconds` counts
        self.micro_batches = config.accumulation * self.ranks.count
        if config.batch % self.micro_batches:
            raise BadRecipe(
                f"A batch of {config.batch} cannot be computed in {self.micro_batches} equal pieces "
                f"(accumulation times processes). Use a multiple of {self.micro_batches}."
            )
        self.resumed = bool(resume and self.path and self.path.exists())
        self.ranks.barrier()  # all have looked before the first of them writes
        if self.resumed:
            self._load()

    # ---- for the code that trains something ------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the budget is used up, or training has converged."""
        c = self.config
        return self.fraction >= 1 or bool(c.patience and self.state.has_converged(c.patience, c.min_gain))

    @property
    def metrics_log(self) -> MetricsLog:
        """The log of losses and evaluations."""
        return self.logger.metrics_log

    @property
    def fraction(self) -> float:
        """How much of the budget is used, 0 to 1; a function of what the checkpoint stores."""
        by_steps = self.state.step / self.config.steps if self.config.steps else 0.0
        by_time = self.state.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def autocast(self) -> torch.autocast:
        """bfloat16 over float32 weights, where the configuration wants it and the device has it."""
        return precision.autocast(self.device, self.config.bf16)

    def compiled(self, module: Any) -> Any:
        """The module for calls in `loss`; parameters stay those of the module itself."""
        return torch.compile(module) if self.config.compile and self.device.type == "cuda" else module

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model has its EMA weights, in evaluation mode, without gradients."""
        training = self.model.training
        self.ema.store(self.averaged)
        self.ema.copy_to(self.averaged)
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.ema.restore(self.averaged)
            self.model.train(training)

    def restore_best(self) -> None:
        """Give the model the weights of the lowest evaluation, if they were kept."""
        if self.best:
            self.model.load_state_dict(self.best)

    # ---- the loop --------------------------------------------------------------------------------

    def train(
        self, loss: Loss, *, prepare: Prepare | None = None, evaluate: Evaluate | None = None,
        sample: Sample | None = None, after: After | None = None, stop: Event | None = None,
    ) -> Iterator[events.Event]:  # fmt: skip
        """Train until the budget is used up, or training has converged.

        after  called when a step has changed the weights
        stop   ends training after the step at hand, with a checkpoint, when it is set (`interrupted` says so).
               Without it, Ctrl-C and SIGTERM do the same and then raise KeyboardInterrupt.
        Raises Diverged, OutOfMemory, StorageError; the last checkpoint then stands.
        """
        if self.finished:
            yield events.Note(f"{self.stage}: already trained ({self.state.step} steps).")
            return
        if self.resumed:
            yield events.Note(f"{self.stage}: going on after step {self.state.step}.")
        else:
            self.save()  # something to go back to; also finds a full disk before the work is done
        self.logger.begin(self.state, device_name(self.device))
        self.model.train()
        with ExitStack() as stack:
            signalled = stop or stack.enter_context(interruptible())
            batches = Prefetch(prepare, stack.enter_context(ThreadPoolExecutor(1)))
            yield from self._loop(
                loss, batches, evaluate, sample, after, lambda: self.ranks.any(signalled.is_set())
            )  # fmt: skip
        if self.interrupted and stop is None:
            raise KeyboardInterrupt

    def _loop(
        self, loss: Loss, batches: Prefetch, evaluate: Evaluate | None, sample: Sample | None,
        after: After | None, stopped: Callable[[], bool],
    ) -> Iterator[events.Event]:  # fmt: skip
        c, log = self.config, self.logger
        self._clock = time.monotonic()
        saved = sampled = self.state.seconds
        last_progress, bad_steps = -math.inf, 0
        while not self.finished:
            ctx = self.context(self.state.step)
            data = batches.get(ctx, self.context(ctx.step + 1))
            try:
                losses = self.step(ctx, loss, data, after)
            except (torch.OutOfMemoryError, RuntimeError) as e:
                yield self._halve_batch(e)
                continue
            s = self.state
            s.step += 1
            self._tick()
            if losses is None:
                s.skipped += 1
                bad_steps += 1
                if bad_steps == MAX_SKIPS:
                    yield self._roll_back(ctx.step)
                    bad_steps = 0
                    continue
                if not (self.finished or stopped()):
                    continue
            else:
                bad_steps = 0
                s.seen += ctx.batch_size
                log.add(losses)
                if evaluate and c.evaluate_steps and (s.step % c.evaluate_steps == 0 or s.step == c.steps):
                    self._evaluate(evaluate)
            if s.step % c.log_steps == 0 or self.finished:
                log.write(s, self.lr(c.lr))
            if losses is not None and (s.seconds - last_progress >= c.progress_seconds or self.finished):
                last_progress = s.seconds
                yield log.progress(s, losses)
            if c.evaluate_steps is None and (s.seconds - sampled > 60 * c.sample_minutes or self.finished):
                yield from self._report(evaluate, sample)
                self._tick()
                sampled = s.seconds
            self.interrupted = stopped() and not self.finished
            due = s.seconds - saved > 60 * c.save_minutes or (c.save_steps and s.step % c.save_steps == 0)
            if self.interrupted or self.finished or due:
                if not checkpoint.is_finite(self.model):
                    yield self._roll_back(ctx.step)
                    continue
                self.save()
                saved = s.seconds
            if self.interrupted:
                return

    def context(self, step: int) -> StepContext:
        """The randomness and batch size of a step."""
        s = self.state
        return StepContext(step, s.batch, (self.config.seed, s.rollbacks, step), rollbacks=s.rollbacks)

    # ---- one step --------------------------------------------------------------------------------

    def step(self, ctx: StepContext, loss: Loss, data: Any, after: After | None = None) -> Losses | None:
        """One optimizer step. None when the loss or a gradient is NaN or Inf: then nothing has changed."""
        torch.manual_seed(int(ctx.step_generator(0).integers(2**62)))  # for dropout and the like
        for settings, group in zip(self.optimizer.param_groups, self.groups, strict=True):
            settings["lr"] = self.lr(group.lr)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.backward(ctx, loss, data)
        norms = [nn.utils.clip_grad_norm_(g.parameters, g.clip or math.inf) for g in self.groups]
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        if not math.isfinite(float(losses["loss"] + norm)):
            return None
        self.optimizer.step()
        self.ema.step(self.averaged)
        if after:
            after(ctx)
        return losses | {"norm": norm}

    def backward(self, ctx: StepContext, loss: Loss, data: Any) -> dict[str, Tensor]:
        """Gradients of the whole batch, averaged over micro-batches and processes; the mean losses."""
        n, scale = self.config.accumulation, self.config.loss_scale
        losses: dict[str, Tensor] = {}
        for k in range(n):
            part = replace(ctx, micro_batch=self.ranks.rank * n + k, micro_batches=self.micro_batches)
            parts = loss(part, data)
            (parts["loss"] * scale / n).backward()  # type: ignore[no-untyped-call]
            for name, value in parts.items():
                losses[name] = losses.get(name, 0) + value.detach() / n
        gradients = [p.grad for g in self.groups for p in g.parameters if p.grad is not None]
        if scale != 1:
            torch._foreach_div_(gradients, scale)
        self.ranks.average([*gradients, *losses.values()])
        return losses

    def lr(self, peak: float) -> float:
        """Learning rate of the coming step: warm-up in steps, constant, linear fall over `decay`."""
        c = self.config
        rise = min(1.0, (self.state.step + 1) / c.warmup) if c.warmup else 1.0
        fall = min(1.0, (1 - self.fraction) / c.decay) if c.decay else 1.0
        return peak * self.state.lr_scale * rise * max(c.floor, fall)

    # ---- what happens between steps --------------------------------------------------------------

    def _tick(self) -> None:
        """Count the time since the last call; all processes agree on it."""
        now = time.monotonic()
        self.state.seconds = self.ranks.of_first(self.state.seconds + now - self._clock)
        self._clock = now

    def _evaluate(self, evaluate: Evaluate) -> None:
        """The loss on the fixed batches: for early stopping, and for the best weights."""
        with self.averaged_weights():
            value = self.ranks.of_first(evaluate()["loss"])
            s = self.state
            s.history.append(value)
            if value < s.best:
                s.best, s.best_step = value, s.step
                if self.config.keep_best:
                    self.best = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        self.logger.evaluation(s, {"loss": value})

    def _report(self, evaluate: Evaluate | None, sample: Sample | None) -> Iterator[events.Event]:
        """Evaluation, sample and learning curve, by the first process."""
        if self.ranks.is_first:
            with self.averaged_weights():
                values, image = dict(evaluate()) if evaluate else {}, sample() if sample else None
            yield from self.logger.report(self.state, values, image)

    def _halve_batch(self, e: RuntimeError) -> events.Note:
        """After running out of memory: half the batch, at the same learning rate, for the same step again."""
        if not is_out_of_memory(e):
            raise e
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = self.state.batch // 2
        if half < SMALLEST_BATCH or half % self.micro_batches or self.ranks.count > 1:
            raise OutOfMemory(
                f"Stage {self.stage} does not fit into the memory of {self.device}, even with a batch of "
                f"{self.state.batch}. Close other programs, or use --device cpu."
            ) from e
        self.state.batch = half
        return events.Note(f"{self.stage}: memory is short; batch {half} from here on.", warning=True)

    def _roll_back(self, step: int) -> events.Note:
        """Back to the last checkpoint, at half the learning rate and with other batches."""
        before = self.state
        if before.rollbacks == MAX_ROLLBACKS:
            anew = f"The last good checkpoint stands: {self.path}. To start anew, delete it and choose"
            raise Diverged(
                f"Stage {self.stage} diverged at step {step}: the loss is NaN or Inf, also after going back "
                f"{MAX_ROLLBACKS} times at half the learning rate. {anew if self.path else 'Choose'} a lower "
                f"learning rate than {self.config.lr:g}."
            )
        self._load()
        s = self.state
        s.rollbacks, s.lr_scale, s.skipped = before.rollbacks + 1, before.lr_scale / 2, before.skipped
        s.seconds = before.seconds
        self.logger.rewind(s)
        self.save()
        return events.Note(
            f"{self.stage}: the loss was NaN or Inf; back to step {s.step} at half the learning rate.",
            warning=True,
        )

    # ---- checkpoints -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint, whole or not at all. Raises StorageError; the older one survives."""
        if self.ranks.is_first:
            tensors = checkpoint.gather(self.model, self.ema.shadow_params, self.optimizer, self.best)
            meta = {"state": asdict(self.state), "facts": self.facts, "averaged": self.ema.optimization_step}
            if self.path:
                checkpoint.write(self.path, tensors, meta)
            else:
                self._memory = {k: v.clone() for k, v in tensors.items()}, meta
        self.ranks.barrier()

    def _load(self) -> None:
        if self.path:
            tensors, meta = checkpoint.read(self.path)
        else:
            assert self._memory is not None
            tensors, meta = self._memory
        self.unverified = checkpoint.compare_facts(self.path, meta, self.facts, self.former_facts)
        checkpoint.restore(self.path, tensors, self.model, self.ema.shadow_params, self.optimizer)
        self.best = checkpoint.under(tensors, "best.")
        self.ema.optimization_step = meta["averaged"]
        self.state = TrainerState(**meta["state"])
