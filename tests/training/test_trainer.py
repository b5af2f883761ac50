"""The training loop: resumed bit for bit after every fault, unharmed by NaN, short memory and full disks."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minikin.errors import AssetError, BadRecipe, Diverged, OutOfMemory, StorageError
from minikin.events import Note, Progress
from minikin.training import checkpoint
from minikin.training.config import StepContext, TrainingConfig
from minikin.training.trainer import CHECKPOINT, Trainer
from tests.conftest import filling

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes: Any) -> TrainingConfig:
    options = {"steps": 12, "batch": 8, "bf16": False, "log_steps": 1, "warmup": 3, "lr": 0.05, **changes}
    return TrainingConfig(**options)


def network() -> nn.Module:
    """Convolutions in channels-last layout and a dropout: easily restored wrongly; wide enough for Muon."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.GELU(), nn.Dropout(0.2), nn.Conv2d(64, 64, 1), nn.GELU(),
        nn.Conv2d(64, 3, 3, padding=1),
    )  # fmt: skip
    return net.to(memory_format=torch.channels_last)


def prepare(ctx: StepContext) -> Tensor:
    return torch.from_numpy(ctx.rng.normal(size=(ctx.batch_size, 3, 6, 6)).astype(np.float32))


class Task:
    """Learns to mirror noise; `fail` may raise in a step, or return a factor of its loss."""

    def __init__(self, net: nn.Module, fail: Any = None) -> None:
        self.net, self.fail = net, fail or (lambda ctx: None)

    def __call__(self, ctx: StepContext, x: Tensor) -> dict[str, Tensor]:
        factor = self.fail(ctx)
        x = x[ctx.rows]
        noise = 0.1 * torch.randn((ctx.batch_size, *x.shape[1:]), generator=ctx.generator)[ctx.rows]
        loss = (self.net(x + noise) - x.flip(-1)).pow(2).mean()
        return {"loss": loss * factor if factor is not None else loss}

    def evaluate(self) -> dict[str, float]:
        x = prepare(StepContext(0, 8, (99,)))
        return {"loss": -float((self.net(x) - x.flip(-1)).pow(2).mean())}  # best early, so that it is kept


def trained(
    folder: Path, fail: Any = None, task: type[Task] = Task, facts: Any = None, stop: Any = None, **changes: Any
) -> Trainer:  # fmt: skip
    net = network()
    trainer = Trainer(
        folder, net, config(**changes), device=CPU, facts=facts or {"data": "noise"}, stage="test"
    )
    job = task(net, fail)
    evaluate = job.evaluate if trainer.config.evaluate_steps else None
    work = trainer.train(job, prepare=prepare, evaluate=evaluate, stop=stop)
    trainer.events = list(work)  # type: ignore[attr-defined]
    return trainer


class Killed(Exception):
    pass


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All tensors of a trainer."""
    return checkpoint.gather(
        trainer.model, trainer.ema.shadow_params, trainer.optimizer, trainer.best
    )  # fmt: skip


def assert_equal(a: Trainer, b: Trainer) -> None:
    """Equal to the bit: weights, EMA, moments, best weights; evaluations and logged losses."""
    first, second = everything(a), everything(b)
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []
    assert (a.state.step, a.state.seen, a.state.history) == (b.state.step, b.state.seen, b.state.history)
    losses = [[(r["step"], r["loss"]) for r in t.metrics_log.rows() if "loss" in r] for t in (a, b)]
    assert losses[0] == losses[1] and losses[0]


# ---- resumption ------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon", "ema": 0.9},
    "plain adamw without ema": {"fused": False, "ema": 0.0, "clip": None, "loss_scale": 2.0**14},
    "accumulation": {"accumulation": 4},
    "best weights": {"evaluate_steps": 2, "keep_best": True, "ema": 0.0},
}
Fault = Callable[[Path, dict[str, Any]], None]


def killed(step: int, save_minutes: float) -> Fault:
    """The process ends in this step; steps after the last checkpoint are lost and come again."""

    def fault(folder: Path, options: dict[str, Any]) -> None:
        def fail(ctx: StepContext) -> None:
            if ctx.step == step:
                raise Killed

        with pytest.raises(Killed):
            trained(folder, fail, save_minutes=save_minutes, **options)

    return fault


def signalled(number: int) -> Fault:
    """The step at hand is finished and saved, then KeyboardInterrupt; the old handler is back."""

    def fault(folder: Path, options: dict[str, Any]) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

        def fail(ctx: StepContext) -> None:
            if ctx.step == 4 and ctx.micro_batch == 0:
                os.kill(os.getpid(), number)

        with pytest.raises(KeyboardInterrupt):
            trained(folder, fail, save_minutes=60, **options)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert checkpoint.read(folder / CHECKPOINT)[1]["state"]["step"] == 5

    return fault


def stopped(folder: Path, options: dict[str, Any]) -> None:
    """The caller's event: training returns."""
    stop = threading.Event()
    trainer = trained(folder, lambda ctx: stop.set() if ctx.step == 6 else None, stop=stop, **options)
    assert trainer.interrupted and trainer.state.step == 7


def full_disk(folder: Path, options: dict[str, Any]) -> None:
    """The checkpoint of an earlier step survives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", filling(10))
        with pytest.raises(
            StorageError, match="checkpoint.safetensors was not written: the disk is full. Free some"
        ):
            trained(folder, save_minutes=0, **options)
    assert checkpoint.read(folder / CHECKPOINT)[1]["state"]["step"] == 4


FAULTS: dict[str, Fault] = {
    "killed in step 1": killed(1, 0),
    "killed in step 5": killed(5, 0), "killed in the last step": killed(11, 0),
    "killed long after a checkpoint": killed(7, 60), "Ctrl-C": signalled(signal.SIGINT),
    "SIGTERM": signalled(signal.SIGTERM), "stopped": stopped, "disk full": full_disk,
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def whole(request: Any, tmp_path_factory: Any, one_thread: None) -> tuple[str, Trainer]:
    """An uninterrupted run of every kind."""
    return request.param, trained(tmp_path_factory.mktemp("whole"), **KINDS[request.param])


@pytest.fixture
def no_curve(monkeypatch: Any) -> None:
    """Drawing the curve takes most of the time of these runs."""
    monkeypatch.setattr("minikin.training.logger.curve", lambda *_: None)


@pytest.mark.usefixtures("no_curve")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_resumed_run_equals_the_uninterrupted_one(
    fault: str, whole: tuple[str, Trainer], tmp_path: Path
) -> None:  # fmt: skip
    """The one proof of resumption, to the bit: every fault, every kind of run."""
    kind, uninterrupted = whole
    FAULTS[fault](tmp_path, KINDS[kind])
    step = checkpoint.read(tmp_path / CHECKPOINT)[1]["state"]["step"]
    resumed = trained(tmp_path, **KINDS[kind])
    assert f"going on after step {step}" in resumed.events[0].text  # type: ignore[attr-defined]
    assert_equal(uninterrupted, resumed)
    if kind == "best weights":
        assert 0 < resumed.state.best_step < 12  # the last weights are not the best, so both were restored


@pytest.mark.usefixtures("no_curve")
def test_a_forgotten_part_of_the_state_is_noticed(whole: tuple[str, Trainer], tmp_path: Path) -> None:
    """The positive control: without the optimizer's moments the resumed run is another one."""
    kind, uninterrupted = whole
    killed(5, 0)(tmp_path, KINDS[kind])
    tensors, meta = checkpoint.read(tmp_path / CHECKPOINT)
    checkpoint.write(tmp_path / CHECKPOINT, {k: v for k, v in tensors.items() if "optimizer.2" not in k}, meta)
    resumed = trained(tmp_path, **KINDS[kind])
    assert any(not torch.equal(v, everything(resumed)[k]) for k, v in everything(uninterrupted).items())


def test_a_checkpoint_can_be_kept_in_memory(tmp_path: Path) -> None:
    """Without a folder nothing is written; a roll-back returns to the last checkpoint all the same."""

    def fail(ctx: StepContext) -> float | None:
        return math.inf if ctx.step >= 6 and ctx.rollbacks == 0 else None

    net = network()
    trainer = Trainer(None, net, config(save_steps=4, save_minutes=60), device=CPU)
    notes = [e.text for e in trainer.train(Task(net, fail), prepare=prepare) if isinstance(e, Note)]
    assert any("back to step 4" in text for text in notes) and trainer.state.step == 12
    on_disk = trained(tmp_path, fail, save_steps=4, save_minutes=60)
    assert all(torch.equal(v, everything(on_disk)[k]) for k, v in everything(trainer).items())


def test_an_earlier_checkpoint_can_be_replaced(tmp_path: Path) -> None:
    trained(tmp_path, steps=4)
    assert Trainer(tmp_path, network(), config(), device=CPU, facts={"data": "x"}, resume=False).state.step == 0


# ---- early stopping and the best weights -----------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 3, None])
def test_stops_when_evaluations_no_longer_fall(tmp_path: Path, patience: int | None) -> None:
    """Evaluations 5, 4, 3, 2, 2, 2, ...: the end comes when the last `patience` of more than twice as many
    gained less than `min_gain` of the best before them."""
    values = iter([5.0, 4.0, 3.0, 2.0] + [2.0] * 20)
    net = network()
    options = {"steps": 20, "evaluate_steps": 1, "patience": patience, "ema": 0.0}
    trainer = Trainer(tmp_path, net, config(**options), device=CPU)
    list(trainer.train(Task(net), prepare=prepare, evaluate=lambda: {"loss": next(values)}))
    assert trainer.state.step == {1: 5, 3: 7, None: 20}[patience]
    assert (trainer.state.best, trainer.state.best_step) == (2.0, 4)


@pytest.mark.parametrize("keep_best", [False, True])
def test_the_best_weights_are_restored(tmp_path: Path, keep_best: bool) -> None:
    """Evaluations 3, 1, 2: the weights of the second."""
    values, states, net = iter([3.0, 1.0, 2.0]), [], network()
    options = {"steps": 3, "evaluate_steps": 1, "keep_best": keep_best, "ema": 0.0}
    trainer = Trainer(tmp_path, net, config(**options), device=CPU)

    def evaluate() -> dict[str, float]:
        states.append({k: v.clone() for k, v in net.state_dict().items()})
        return {"loss": next(values)}

    list(trainer.train(Task(net), prepare=prepare, evaluate=evaluate))
    trainer.restore_best()
    best = states[1 if keep_best else 2]
    assert trainer.state.best_step == 2 and not torch.equal(states[1]["0.weight"], states[2]["0.weight"])
    assert all(torch.equal(v, best[k]) for k, v in net.state_dict().items())


def test_early_stopping_needs_evaluations() -> None:
    with pytest.raises(BadRecipe, match="Early stopping and the best weights need evaluate_steps"):
        TrainingConfig.make(steps=3, patience=2)


# ---- budget and learning rate ----------------------------------------------------------------------


def test_training_on_another_thread(tmp_path: Path) -> None:
    """Only the main thread may have signal handlers."""
    runs: list[Trainer] = []
    thread = threading.Thread(target=lambda: runs.append(trained(tmp_path)))
    thread.start()
    thread.join()
    assert runs[0].finished


def test_a_larger_budget_goes_on(tmp_path: Path) -> None:
    assert trained(tmp_path, steps=5).state.step == 5
    again = trained(tmp_path, steps=5)
    assert "already trained (5 steps)" in again.events[0].text  # type: ignore[attr-defined]
    assert trained(tmp_path, steps=9).state.step == 9


def test_budgets_in_minutes_count_over_interruptions(tmp_path: Path, monkeypatch: Any) -> None:
    now = [0.0]
    monkeypatch.setattr("minikin.training.trainer.time", SimpleNamespace(monotonic=lambda: now[0]))

    def steady(ctx: StepContext) -> None:
        now[0] += 0.02

    def dying(ctx: StepContext) -> None:
        steady(ctx)
        if ctx.step == 5:
            raise Killed

    with pytest.raises(Killed):
        trained(tmp_path, dying, steps=None, minutes=0.5 / 60, save_minutes=0)
    now[0] += 1000  # while nothing runs
    trainer = trained(tmp_path, steady, steps=None, minutes=0.5 / 60, save_minutes=0)
    assert trainer.finished and trainer.state.seconds >= 0.5
    assert trainer.state.step in (25, 26)  # of 0.02 s each, which floats add up to about 0.5
    last = [e for e in trainer.events if isinstance(e, Progress)][-1]  # type: ignore[attr-defined]
    assert last.total == round(60 * 0.5 / 60)


def test_the_learning_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    trainer = trained(tmp_path, steps=20, warmup=4, decay=0.5, floor=0.1)
    rates = []
    for step in range(20):
        trainer.state.step = step
        rates.append(trainer.lr(1.0))
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert rates[4:11] == pytest.approx([1] * 7)
    assert rates[15] == pytest.approx(0.5) and rates[19] == pytest.approx(0.1)


# ---- bad numbers ---------------------------------------------------------------------------------


def test_a_single_bad_loss_is_skipped(tmp_path: Path) -> None:
    trainer = trained(tmp_path, lambda ctx: math.nan if ctx.step == 6 else None)
    assert trainer.state.skipped == 1 and trainer.state.rollbacks == 0 and trainer.state.step == 12
    assert trainer.state.seen == 11 * 8
    assert all(bool(torch.isfinite(v).all()) for v in everything(trainer).values())


def test_a_bad_last_step_still_ends_with_report_and_checkpoint(tmp_path: Path) -> None:
    trainer = trained(tmp_path, lambda ctx: math.nan if ctx.step == 11 else None, save_minutes=60)
    assert trainer.state.step == 12 and trainer.state.skipped == 1
    assert Trainer(tmp_path, network(), config(), device=CPU, facts={"data": "noise"}).state.step == 12
    assert trainer.metrics_log.rows()[-1]["step"] == 11 and (tmp_path / "curve.png").exists()


def test_many_bad_losses_roll_back_to_half_the_learning_rate(tmp_path: Path) -> None:
    """Bad from step 6 on until it has gone back once; the new batches are others than before."""

    def fail(ctx: StepContext) -> float | None:
        return math.inf if ctx.step >= 6 and ctx.rollbacks == 0 else None

    trainer = trained(tmp_path, fail, save_minutes=0)
    assert (trainer.state.rollbacks, trainer.state.lr_scale, trainer.state.step) == (1, 0.5, 12)
    notes = [e for e in trainer.events if isinstance(e, Note) and e.warning]  # type: ignore[attr-defined]
    assert "the loss was NaN or Inf; back to step 6 at half the learning rate" in notes[0].text
    assert [r["step"] for r in trainer.metrics_log.rows() if "loss" in r] == list(range(1, 13))


def test_divergence_ends_with_a_message_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    def fail(ctx: StepContext) -> float | None:
        return math.nan if ctx.step >= 6 else None

    with pytest.raises(
        Diverged, match=r"Stage test diverged at step 10.*going back 2 times.*last good checkpoint"
    ):
        trained(tmp_path, fail, save_minutes=0)
    trainer = Trainer(tmp_path, network(), config(), device=CPU, facts={"data": "noise"})
    assert trainer.state.step == 6
    assert all(bool(torch.isfinite(v).all()) for v in everything(trainer).values())


# ---- disk, memory, foreign and damaged checkpoints -----------------------------------------------


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: Any) -> None:
    """The error comes before anything is computed."""
    monkeypatch.setattr(os, "fsync", filling(0))

    def never(ctx: StepContext) -> None:
        raise AssertionError("trained although nothing can be saved")

    with pytest.raises(StorageError, match="the disk is full"):
        trained(tmp_path, never)


def test_short_memory_halves_the_batch(tmp_path: Path) -> None:
    class Large(Task):
        def __call__(self, ctx: StepContext, x: Tensor) -> dict[str, Tensor]:
            if len(x) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(ctx, x)

    trainer = trained(tmp_path, task=Large, batch=16)
    assert trainer.state.batch == 4 and trainer.state.seen == 48
    assert Trainer(tmp_path, network(), config(batch=16), device=CPU, facts={"data": "noise"}).state.batch == 4

    class TooLarge(Task):
        def __call__(self, ctx: StepContext, x: Tensor) -> dict[str, Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(
        OutOfMemory, match="Stage test does not fit into the memory of cpu, even with a batch of 4"
    ):
        trained(tmp_path / "other", task=TooLarge, batch=16)


def test_other_errors_are_not_swallowed(tmp_path: Path) -> None:
    class Wrong(Task):
        def __call__(self, ctx: StepContext, x: Tensor) -> dict[str, Tensor]:
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trained(tmp_path, task=Wrong)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, steps=2)
    with pytest.raises(BadRecipe, match="belongs to another run: lr is 0.05 there and 0.1 here"):
        trained(tmp_path, lr=0.1)
    with pytest.raises(BadRecipe, match="belongs to another run: data is noise there and scenes here"):
        trained(tmp_path, facts={"data": "scenes"})


@pytest.mark.parametrize("damage", ["empty", "noise", "truncated", "flipped header"])
def test_damaged_checkpoints(tmp_path: Path, damage: str) -> None:
    path = trained(tmp_path, steps=2).path
    good = path.read_bytes()
    bad = {
        "empty": b"", "noise": bytes(4000), "truncated": good[: len(good) // 2],
        "flipped header": good[:8] + b"#" + good[9:],
    }[damage]  # fmt: skip
    path.write_bytes(bad)
    with pytest.raises(
        AssetError, match=r"The checkpoint .* cannot be read .* Delete it to start the stage anew"
    ):
        trained(tmp_path)


def test_torn_lines_of_the_log_are_ignored(tmp_path: Path) -> None:
    trained(tmp_path, steps=2)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 3, "lo')
    assert trained(tmp_path, steps=4).metrics_log.rows()[-1]["step"] == 4


# ---- images and evaluations --------------------------------------------------------------------


def test_evaluations_and_samples_see_the_average(tmp_path: Path, monkeypatch: Any) -> None:
    """And leave the weights as they were: the run with them ends where the one without does."""
    from PIL import Image

    plain = trained(tmp_path / "plain")
    net = network()
    trainer = Trainer(
        tmp_path / "seen", net, config(sample_minutes=1e-9), device=CPU, facts={"data": "noise"}, stage="test"
    )
    is_average = []

    def evaluate() -> dict[str, float]:
        torch.randn(3)  # the loop's own randomness does not depend on this
        is_average.append(
            all(torch.equal(p, e) for p, e in zip(net.parameters(), trainer.ema.shadow_params, strict=True))
        )
        return {"error": 1.0}

    work = trainer.train(Task(net), prepare=prepare, evaluate=evaluate,
                     sample=lambda: Image.new("RGB", (8, 8)))  # fmt: skip
    assert sum("error 1" in e.text for e in work if isinstance(e, Note)) == 12
    assert all(is_average)
    assert_equal(plain, trainer)
    assert len(list((tmp_path / "seen" / "samples").glob("*.png"))) == 12
    pytest.importorskip("matplotlib")
    assert (tmp_path / "seen" / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16", None])
def test_bfloat16_keeps_float32_weights(tmp_path: Path, monkeypatch: Any, unit: str | None) -> None:
    """And is left out where it would be imitated, which costs more than twice the time of float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, str(unit): True})
    net = network()
    trainer = Trainer(tmp_path, net, config(bf16=True, steps=2), device=CPU)
    kinds = []

    def loss(ctx: StepContext, data: Any) -> dict[str, Tensor]:
        with trainer.autocast():
            y = net(torch.ones(ctx.batch_size, 3, 6, 6))
        kinds.append(y.dtype)
        return {"loss": y.float().pow(2).mean()}

    list(trainer.train(loss))
    assert kinds == [torch.bfloat16 if unit else torch.float32] * 2
    assert all(p.dtype is torch.float32 for p in net.parameters())
