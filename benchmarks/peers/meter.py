"""How a peer is measured: alike for all of them, and without making the device wait."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ftlaunch.peers.work import Result, Work

_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets")


class Meter:
    """Counts what the model is fed and notes the times of steps."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._on_cuda = work.device == "cuda"
        self._loss: torch.Tensor | None = None
        self._losses: list[torch.Tensor] = []
        # A micro-batch each: samples, tokens without padding, tokens.
        self._counts: list[tuple[int, torch.Tensor, int]] = []
        # Entry 0 is the beginning of training, entry n the end of optimizer step n.
        self._seconds: list[float] = []
        self._cpu_seconds: list[float] = []
        self._counted: list[int] = []
        self._first_step_at = 0.0
        self.started_at = process_start() if work.started_at is None else work.started_at

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Before every forward pass of training."""
        mask = inputs["attention_mask"]
        self._counts.append((mask.shape[0], mask.sum(), mask.numel()))

    def add_loss(self, share: torch.Tensor) -> None:
        """After every forward pass: what the micro-batch adds to the loss of the step."""
        share = share.detach()
        self._loss = share if self._loss is None else self._loss + share

    def begin(self) -> None:
        self._mark()

    def end_step(self) -> None:
        assert self._loss is not None
        self._losses.append(self._loss)
        self._loss = None
        self._mark()
        if len(self._losses) == 1:
            self._first_step_at = time.time()

    def _mark(self) -> None:
        steps = len(self._losses)
        if self._on_cuda and steps in (1, self._work.warmup_steps, self._work.steps):
            torch.cuda.synchronize()
        self._seconds.append(time.perf_counter())
        self._cpu_seconds.append(time.process_time())
        self._counted.append(len(self._counts))

    def result(
        self, peer: str, settings: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> Result:
        """Collective. SystemExit where no step is left to be measured."""
        warmup = self._work.warmup_steps
        steps = len(self._losses) - warmup
        if steps < 1:
            raise SystemExit(
                f"{len(self._losses)} steps, {warmup} of them warm-up: none to measure."
            )
        measured = self._counts[self._counted[warmup] : self._counted[-1]]
        seconds = self._seconds[-1] - self._seconds[warmup]
        sums = _sum_across_ranks(
            [
                sum(samples for samples, _, _ in measured),
                int(torch.stack([tokens for _, tokens, _ in measured]).sum()),
                sum(padded for _, _, padded in measured),
                self._cpu_seconds[-1] - self._cpu_seconds[warmup],
                *torch.stack(self._losses).double().tolist(),
            ],
            self._work.device,
        )
        samples, tokens, padded, cpu_seconds, *losses = sums
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        return Result(
            peer=peer,
            num_ranks=num_ranks,
            num_threads=torch.get_num_threads(),
            precision=self._work.precision,
            steps=steps,
            warmup_steps=warmup,
            train_seconds=seconds,
            samples=int(samples),
            tokens=int(tokens),
            padded_tokens=int(padded),
            samples_per_second=samples / seconds,
            tokens_per_second=tokens / seconds,
            padding_share=1 - tokens / padded,
            step_seconds=[
                end - start
                for start, end in zip(
                    self._seconds[warmup:-1], self._seconds[warmup + 1 :], strict=True
                )
            ],
            cpu_seconds=cpu_seconds,
            losses=[loss / num_ranks for loss in losses],
            peak_bytes=self._peak_bytes(),
            first_step_at=self._first_step_at,
            started_at=self.started_at,
            settings=settings,
            versions={name: found for name in _PACKAGES if (found := _version(name))},
            metrics=metrics or {},
        )

    def _peak_bytes(self) -> int:
        if self._on_cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def process_start() -> float:
    """Unix time at which this process was started, to 10 ms, from /proc (Linux)."""
    # The command's name may hold blanks; after its ")" the start time is field 22 of 52.
    words = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot = int(words[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def _sum_across_ranks(values: list[float], device: str) -> list[float]:
    """Collective."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
