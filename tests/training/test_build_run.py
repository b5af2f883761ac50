"""The one training loop of the build: bit for bit, unharmed by kills, bad numbers and full disks."""

from __future__ import annotations

import math
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minikin.errors import AssetError, BadRecipe, Diverged, OutOfMemory, StorageError
from minikin.events import Note, Progress
from minikin.training.plan import Plan, Turn
from minikin.training.run import Run
from tests.conftest import filling

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def plan(**changes: Any) -> Plan:
    return Plan.make(
        **{"steps": 12, "batch": 8, "bf16": False, "log_steps": 1, "warmup": 3, "rate": 0.05, **changes}
    )


def network() -> nn.Module:
    """Convolutions in channels-last layout and a dropout: what is easily restored wrongly."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.GELU(), nn.Dropout(0.2), nn.Conv2d(6, 3, 3, padding=1)
    )
    return net.to(memory_format=torch.channels_last)


def prepare(turn: Turn) -> Tensor:
    return torch.from_numpy(turn.rng.normal(size=(turn.size, 3, 6, 6)).astype(np.float32))


class Task:
    """Learns to mirror noise; may fail at a step."""

    def __init__(self, net: nn.Module, fail: Any = None) -> None:
        self.net, self.fail = net, fail or (lambda turn: None)
        self.sizes: list[int] = []

    def __call__(self, turn: Turn, x: Tensor) -> dict[str, Tensor]:
        self.sizes.append(len(x))
        wrong = self.fail(turn)
        noise = 0.1 * torch.randn(x.shape, generator=turn.generator)
        loss = (self.net(x + noise) - x.flip(-1)).pow(2).mean()
        return {"loss": loss * wrong if wrong is not None else loss}


def trained(folder: Path, fail: Any = None, task: type[Task] = Task, facts: Any = None, **changes: Any) -> Run:
    net = network()
    run = Run(folder, net, plan(**changes), device=CPU, facts=facts or {"data": "noise"}, stage="test")
    run.events = list(run.train(task(net, fail), prepare=prepare))  # type: ignore[attr-defined]
    return run


class Killed(Exception):
    pass


def killed_at(step: int) -> Any:
    def fail(turn: Turn) -> None:
        if turn.step == step:
            raise Killed

    return fail


def everything(run: Run) -> dict[str, Tensor]:
    out = {f"model.{k}": v for k, v in run.model.state_dict().items()}
    out |= {f"ema.{i}": v for i, v in enumerate(run.ema.shadow_params)}
    for i, s in run.optimizer.state_dict()["state"].items():
        out |= {f"optimizer.{i}.{k}": v for k, v in s.items()}
    return out


def assert_equal(a: Run, b: Run) -> None:
    one, two = everything(a), everything(b)
    assert one.keys() == two.keys()
    assert [k for k in one if not torch.equal(one[k], two[k])] == []


@pytest.mark.parametrize("step", [1, 5, 11])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, step: int) -> None:
    """Weights, average, moments and logged losses, bit for bit; saved after every step, died in one."""
    whole = trained(tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tmp_path / "part", killed_at(step), save_minutes=0)
    resumed = trained(tmp_path / "part", save_minutes=0)
    assert any(isinstance(e, Note) and f"going on after step {step}" in e.text for e in resumed.events)  # type: ignore[attr-defined]
    assert_equal(whole, resumed)
    losses = [[r["loss"] for r in run.journal.rows() if "loss" in r] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_what_was_lost_comes_again(tmp_path: Path) -> None:
    """Died long after the last checkpoint: the same end, and no line of the log twice."""
    whole = trained(tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tmp_path / "part", killed_at(7), save_minutes=60)
    resumed = trained(tmp_path / "part")
    assert_equal(whole, resumed)
    assert [r["step"] for r in resumed.journal.rows() if "loss" in r] == list(range(1, 13))


def test_ctrl_c_saves_between_steps(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    whole = trained(tmp_path / "whole")

    def interrupt(turn: Turn) -> None:
        if turn.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "part", interrupt, save_minutes=60)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = trained(tmp_path / "part")
    assert "going on after step 5" in resumed.events[0].text  # type: ignore[attr-defined]
    assert_equal(whole, resumed)


def test_training_on_another_thread(tmp_path: Path) -> None:
    """Only the main thread may have signal handlers."""
    done: list[Run] = []
    thread = threading.Thread(target=lambda: done.append(trained(tmp_path)))
    thread.start()
    thread.join()
    assert done[0].finished


def test_a_larger_budget_goes_on(tmp_path: Path) -> None:
    assert trained(tmp_path, steps=5).state.step == 5
    again = trained(tmp_path, steps=5)
    assert "already trained (5 steps)" in again.events[0].text  # type: ignore[attr-defined]
    assert trained(tmp_path, steps=9).state.step == 9


def test_budgets_in_minutes_count_over_interruptions(tmp_path: Path, monkeypatch: Any) -> None:
    now = [0.0]
    monkeypatch.setattr("minikin.training.run.time", SimpleNamespace(monotonic=lambda: now[0]))

    def steady(turn: Turn) -> None:
        now[0] += 0.02

    def dying(turn: Turn) -> None:
        steady(turn)
        if turn.step == 5:
            raise Killed

    with pytest.raises(Killed):
        trained(tmp_path, dying, steps=None, minutes=0.5 / 60, save_minutes=0)
    now[0] += 1000  # while nothing runs
    run = trained(tmp_path, steady, steps=None, minutes=0.5 / 60, save_minutes=0)
    assert run.finished and run.state.seconds >= 0.5
    assert run.state.step in (25, 26)  # of 0.02 s each, which floats add up to about 0.5
    last = [e for e in run.events if isinstance(e, Progress)][-1]  # type: ignore[attr-defined]
    assert last.total == round(60 * 0.5 / 60)


def test_the_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    run = trained(tmp_path, steps=20, warmup=4, decay=0.5, floor=0.1)
    rates = []
    for step in range(20):
        run.state.step = step
        rates.append(run.rate / 0.05)
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert rates[4:11] == pytest.approx([1] * 7)
    assert rates[15] == pytest.approx(0.5) and rates[19] == pytest.approx(0.1)


# ---- bad numbers ---------------------------------------------------------------------------------


def test_a_single_bad_loss_is_skipped(tmp_path: Path) -> None:
    run = trained(tmp_path, lambda turn: math.nan if turn.step == 6 else None)
    assert run.state.skipped == 1 and run.state.rollbacks == 0 and run.state.step == 12
    assert run.state.seen == 11 * 8
    assert all(bool(torch.isfinite(v).all()) for v in everything(run).values())


def test_a_bad_last_step_still_ends_with_report_and_checkpoint(tmp_path: Path) -> None:
    run = trained(tmp_path, lambda turn: math.nan if turn.step == 11 else None, save_minutes=60)
    assert run.state.step == 12 and run.state.skipped == 1
    assert Run(tmp_path, network(), plan(), device=CPU, facts={"data": "noise"}).state.step == 12
    assert run.journal.rows()[-1]["step"] == 11 and (tmp_path / "curve.png").exists()


def test_many_bad_losses_go_back_and_on_at_half_the_rate(tmp_path: Path) -> None:
    """Bad from step 6 on until it has gone back once; the new batches are others than before."""

    def fail(turn: Turn) -> float | None:
        return math.inf if turn.step >= 6 and turn.seed[1] == 0 else None

    run = trained(tmp_path, fail, save_minutes=0)
    assert (run.state.rollbacks, run.state.rate, run.state.step) == (1, 0.5, 12)
    notes = [e for e in run.events if isinstance(e, Note) and e.warning]  # type: ignore[attr-defined]
    assert "5 losses in a row were not finite; back to step 6 at half the learning rate" in notes[0].text
    assert [r["step"] for r in run.journal.rows() if "loss" in r] == list(range(1, 13))


def test_divergence_ends_with_a_message_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    def fail(turn: Turn) -> float | None:
        return math.nan if turn.step >= 6 else None

    with pytest.raises(
        Diverged, match=r"Stage test diverged at step 10.*going back 2 times.*last good checkpoint"
    ):
        trained(tmp_path, fail, save_minutes=0)
    run = Run(tmp_path, network(), plan(), device=CPU, facts={"data": "noise"})
    assert run.state.step == 6
    assert all(bool(torch.isfinite(v).all()) for v in everything(run).values())


# ---- disk, memory, foreign and damaged checkpoints -----------------------------------------------


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    whole = trained(tmp_path / "whole")
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", filling(10))
        with pytest.raises(
            StorageError, match=r"checkpoint.safetensors was not written: the disk is full. Free some"
        ):
            trained(tmp_path / "part", save_minutes=0)
    resumed = trained(tmp_path / "part", save_minutes=0)
    assert "going on after step 4" in resumed.events[0].text  # type: ignore[attr-defined]
    assert_equal(whole, resumed)


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: Any) -> None:
    """It is told before anything is computed."""
    monkeypatch.setattr(os, "fsync", filling(0))

    def never(turn: Turn) -> None:
        raise AssertionError("trained although nothing can be saved")

    with pytest.raises(StorageError, match="the disk is full"):
        trained(tmp_path, never)


def test_short_memory_halves_the_batch(tmp_path: Path) -> None:
    class Large(Task):
        def __call__(self, turn: Turn, x: Tensor) -> dict[str, Tensor]:
            if len(x) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(turn, x)

    run = trained(tmp_path, task=Large, batch=16)
    assert run.state.batch == 4 and run.state.seen == 48
    assert Run(tmp_path, network(), plan(batch=16), device=CPU, facts={"data": "noise"}).state.batch == 4

    class TooLarge(Task):
        def __call__(self, turn: Turn, x: Tensor) -> dict[str, Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(
        OutOfMemory, match="Stage test does not fit into the memory of cpu, even with a batch of 4"
    ):
        trained(tmp_path / "other", task=TooLarge, batch=16)


def test_other_errors_are_not_swallowed(tmp_path: Path) -> None:
    class Wrong(Task):
        def __call__(self, turn: Turn, x: Tensor) -> dict[str, Tensor]:
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trained(tmp_path, task=Wrong)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, steps=2)
    with pytest.raises(BadRecipe, match="belongs to another run: rate is 0.05 there and 0.1 here"):
        trained(tmp_path, rate=0.1)
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
    assert trained(tmp_path, steps=4).journal.rows()[-1]["step"] == 4


# ---- images and evaluations --------------------------------------------------------------------


def test_evaluations_and_samples_see_the_average(tmp_path: Path, monkeypatch: Any) -> None:
    """And leave the weights as they were: the run with them ends where the one without does."""
    from PIL import Image

    plain = trained(tmp_path / "plain")
    net = network()
    run = Run(
        tmp_path / "seen", net, plan(sample_minutes=1e-9), device=CPU, facts={"data": "noise"}, stage="test"
    )
    seen = []

    def evaluate() -> dict[str, float]:
        torch.randn(3)  # the loop's own randomness does not depend on this
        seen.append(
            all(torch.equal(p, e) for p, e in zip(net.parameters(), run.ema.shadow_params, strict=True))
        )
        return {"error": 1.0}

    work = run.train(Task(net), prepare=prepare, evaluate=evaluate,
                     sample=lambda: Image.new("RGB", (8, 8)))  # fmt: skip
    assert sum("error 1" in e.text for e in work if isinstance(e, Note)) == 12
    assert all(seen)
    assert_equal(plain, run)
    assert len(list((tmp_path / "seen" / "samples").glob("*.png"))) == 12
    pytest.importorskip("matplotlib")
    assert (tmp_path / "seen" / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16", None])
def test_bfloat16_keeps_float32_weights(tmp_path: Path, monkeypatch: Any, unit: str | None) -> None:
    """And is left out where it would be imitated, which costs more than twice the time of float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, str(unit): True})
    net = network()
    run = Run(tmp_path, net, plan(bf16=True, steps=2), device=CPU)
    kinds = []

    def loss(turn: Turn, data: Any) -> dict[str, Tensor]:
        with run.autocast():
            y = net(torch.ones(turn.size, 3, 6, 6))
        kinds.append(y.dtype)
        return {"loss": y.float().pow(2).mean()}

    list(run.train(loss))
    assert kinds == [torch.bfloat16 if unit else torch.float32] * 2
    assert all(p.dtype is torch.float32 for p in net.parameters())
