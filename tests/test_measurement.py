"""Where a rank's time goes, with real ranks of which one is held up on purpose."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.strategies import measurement
from ftlaunch.strategies.options import BenchOptions, JobOptions, ModelOptions, TrainOptions
from ftlaunch.strategies.progress import Measured
from ftlaunch.strategies.session import SessionRequest
from ftlaunch.strategies.torch.ddp import TorchDataParallel
from ftlaunch.strategies.torch.zero import TorchZero
from tests.ranks import run_ranks
from tests.tiny import write_config

# Far above what a step of the tiny model takes, also on a busy machine.
_HELD_UP_SECONDS = 0.3


class _NoStop:
    ends_at_once = True

    def requested(self) -> bool:
        return False


def _measure(world, listen_fd, folder, strategy):
    """Rank 1 computes slowly. Rank 0 returns what was measured."""
    kind: Any = {"ddp": TorchDataParallel, "zero2": TorchZero}[strategy]
    if world.rank == 1:
        accumulate = kind.accumulate

        def slowly(self, *args, **kwargs):
            time.sleep(_HELD_UP_SECONDS)
            return accumulate(self, *args, **kwargs)

        kind.accumulate = slowly  # in this process alone, which was forked for it
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


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.long)])
def test_the_others_wait_for_the_slow_one(strategy, tmp_path):
    [measured], nothing = run_ranks(2, _measure, write_config(tmp_path, "bert"), strategy)
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
