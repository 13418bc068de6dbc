"""Where a rank's time goes, with real ranks of which one is held up on purpose."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlaunch.strategies import measurement
from ftlaunch.strategies.options import BenchOptions, JobOptions, ModelOptions, TrainOptions
from ftlaunch.strategies.progress import Measured
from ftlaunch.strategies.session import SessionRequest
from ftlaunch.strategies.torch.ddp import TorchDataParallel
from ftlaunch.strategies.torch.instruments import TorchInstruments
from ftlaunch.strategies.torch.zero import TorchZero
from tests.ranks import run_ranks
from tests.tiny import write_config

# Far above what a step of the tiny model takes, also on a busy machine.
_HELD_UP_SECONDS = 0.3


class _NoStop:
    ends_at_once = True

    def requested(self) -> bool:
        return False


def _measure_slowly(world, listen_fd, folder, strategy):
    """Rank 1 computes slowly. Rank 0 returns what was measured."""
    kind: Any = {"ddp": TorchDataParallel, "zero2": TorchZero}[strategy]
    if world.rank == 1:
        accumulate = kind.accumulate

        def slowly(self, *args, **kwargs):
            time.sleep(_HELD_UP_SECONDS)
            return accumulate(self, *args, **kwargs)

        kind.accumulate = slowly  # in this process alone, which was forked for it
    return _measure(world, listen_fd, folder, strategy)


def _measure_by_another_clock(world, listen_fd, folder):
    """It goes on by 1 in each micro-batch, and by 100 whenever the device is waited for."""
    clock = 0.0
    accumulate = TorchDataParallel.accumulate

    def counted(self, *args, **kwargs):
        nonlocal clock
        clock += 1
        return accumulate(self, *args, **kwargs)

    def synchronize(self):
        nonlocal clock
        clock += 100

    for owner, name, function in (
        (TorchDataParallel, "accumulate", counted),
        (TorchInstruments, "synchronize", synchronize),
        (TorchInstruments, "stamp", lambda self: clock),
        (TorchInstruments, "peak_flops", lambda self: 1.0),
    ):
        setattr(owner, name, function)
    return _measure(world, listen_fd, folder, "ddp")


def _measure(world, listen_fd, folder, strategy):
    options = JobOptions(
        model=ModelOptions(name_or_path=str(folder), random_weights=True),
        train=TrainOptions(global_batch_size=16),
        bench=BenchOptions(steps=3, warmup_steps=1, lengths=20, samples=32),
    )
    request = SessionRequest(
        options=options,
        output_dir=Path("/nowhere"),
        strategy=strategy,
        precision="fp32",
        accelerator="cpu",
        device=0,
        micro_batch=8,
        eval_micro_batch=8,
        num_threads=1,
        timeout_seconds=60,
        world=world,
        listen_fd=listen_fd,
    )
    said: list[object] = []
    measurement.measure(request, emit=said.append, stop=_NoStop())
    return [message for message in said if isinstance(message, Measured)]


def _measure_with_a_large_product(world, listen_fd, folder):
    """As a GPU counts: 9 bytes at most before the product, 7 since it was counted anew after it."""
    most = 9

    def peak_flops(self):
        nonlocal most
        most = 7
        return 1.0

    instruments: Any = TorchInstruments
    strategy: Any = TorchDataParallel
    instruments.peak_flops = peak_flops
    strategy.peak_memory_bytes = lambda self: most
    return _measure(world, listen_fd, folder, "ddp")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.long)])
def test_the_others_wait_for_the_slow_one(strategy, tmp_path):
    [measured], nothing = run_ranks(2, _measure_slowly, write_config(tmp_path, "bert"), strategy)
    assert nothing == []
    waiting, slow = measured.ranks
    # What holds up rank 1 is its own computing, and nobody's communication.
    assert waiting["idle"] > max(waiting["communication"], slow["idle"], slow["communication"])
    assert slow["compute"] > max(waiting["compute"], slow["idle"])
    for rank in measured.ranks:
        parts = [rank[name] for name in ("compute", "communication", "data", "idle")]
        assert sum(parts) == pytest.approx(1.0)
    assert all(seconds > _HELD_UP_SECONDS for seconds in measured.step_seconds)
    # 32 samples are gone round: 3 steps of 16 samples of 20 tokens.
    assert (measured.num_samples, measured.num_tokens) == (48, 960)
    assert (measured.skipped_steps, measured.share_steps) == (0, 3)


def test_measuring_is_no_part_of_what_is_measured(tmp_path):
    """To wait for the device and to read its times is neither data nor anything else of a step."""
    [[measured]] = run_ranks(1, _measure_by_another_clock, write_config(tmp_path, "bert"))
    [rank] = measured.ranks
    assert (rank["compute"], rank["data"]) == (1.0, 0.0)


def test_the_product_that_shows_the_peak_is_no_memory_of_training(tmp_path):
    [[measured]] = run_ranks(1, _measure_with_a_large_product, write_config(tmp_path, "bert"))
    assert measured.ranks[0]["peak_memory_bytes"] == 9


@pytest.mark.parametrize(("device", "last"), [("cuda", "count anew"), ("cpu", "product")])
def test_memory_is_counted_anew_after_the_product(device, last, monkeypatch):
    done = []

    def product_seconds(self, size, at_least):
        done.append("product")
        return 1.0

    monkeypatch.setattr(TorchInstruments, "_product_seconds", product_seconds)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: done.append("count anew")
    )
    instruments = object.__new__(TorchInstruments)
    instruments._device = torch.device(device)
    # 2 · 512³ in a second.
    assert instruments.peak_flops() == 2 * 512**3
    assert (done[:2], done[-1]) == (["product"] * 2, last)
