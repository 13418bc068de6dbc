"""Faults on purpose: which, when, and how they are done to the processes of this machine."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.linux import Process, kill_exactly, limit_memory, read_process
from ftlaunch.launcher.attempts import Timeline

# What each fault does, for the help and for the error message.
KINDS = {
    "kill-rank": "SIGKILL for rank N",
    "stop-rank": "SIGSTOP for rank N: it is there and does nothing",
    "crash-rank": "SIGSEGV for rank N",
    "kill-agent": "SIGKILL for the agent of node N",
    "hang-node": "SIGSTOP for the agent and the ranks of node N: it vanishes without a word",
    "kill-fork-server": "SIGKILL for the fork server of node N",
    "memory-limit": "rank N gets no more memory than it has: its next larger allocation fails",
    "interrupt": "Ctrl-C for the job",
    "terminate": "SIGTERM for the job",
}
_OF_RANKS = ("kill-rank", "stop-rank", "crash-rank", "memory-limit")
_WITHOUT_TARGET = ("interrupt", "terminate")
_PHASES = ("data", "model", "prove", "train", "evaluate", "save")
_PATTERN = re.compile(r"([a-z-]+)(?::(\d{1,6}))?@(?:step(\d{1,9})|(\d{1,6}(?:\.\d+)?)s|([a-z]+))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault: exactly one of step, seconds and phase says when."""

    kind: str
    target: int
    step: int | None = None
    seconds: float | None = None
    phase: str | None = None

    def __str__(self) -> str:
        target = "" if self.kind in _WITHOUT_TARGET else f" {self.target}"
        return f"{self.kind}{target}"


class Processes(Protocol):
    """Where the processes of a job are: what the coordinator knows."""

    ranks: dict[int, Process | None]
    servers: dict[int, Process | None]

    @property
    def agents(self) -> list[Process | None]: ...

    def ranks_of(self, node: int) -> list[int]: ...


class Rehearsal:
    """The faults of one run, each done once when its moment has come."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        self._waiting = list(faults)
        self._due: list[Fault] = []
        self._started = time.monotonic()

    def step(self, number: int) -> None:
        """An optimizer step is done."""
        self._move(lambda fault: fault.step is not None and number >= fault.step)

    def phase(self, name: str) -> None:
        """The ranks have begun something else."""
        self._move(lambda fault: fault.phase == name)

    def tick(self, processes: Processes, timeline: Timeline) -> None:
        """Do what is due."""
        passed = time.monotonic() - self._started
        self._move(lambda fault: fault.seconds is not None and passed >= fault.seconds)
        for fault in self._due[:]:
            if _do(fault, processes):
                timeline.add(f"fault: {fault}")
                self._due.remove(fault)

    def _move(self, is_due: Callable[[Fault], bool]) -> None:
        for fault in [fault for fault in self._waiting if is_due(fault)]:
            self._waiting.remove(fault)
            self._due.append(fault)


def parse_fault(text: str) -> Fault:
    """KIND:TARGET@MOMENT, as in "kill-rank:3@step5". UserError."""
    match = _PATTERN.fullmatch(text)
    if match is None or match[1] not in KINDS or (match[5] or "data") not in _PHASES:
        raise UserError(
            f"--fault {text[:100]!r} is not understood. Write KIND:NUMBER@MOMENT, for example "
            f"kill-rank:3@step5, hang-node:2@20s, kill-rank:0@save. Kinds: {', '.join(KINDS)}. "
            f"Moments: stepN, Ns, {', '.join(_PHASES)}."
        )
    kind, target = match[1], match[2]
    if (target is None) != (kind in _WITHOUT_TARGET):
        needs = "takes no number" if target is not None else "needs the number of a rank or node"
        raise UserError(f"--fault {text!r}: {kind} {needs}. {kind}: {KINDS[kind]}.")
    return Fault(
        kind=kind,
        target=int(target or 0),
        step=int(match[3]) if match[3] else None,
        seconds=float(match[4]) if match[4] else None,
        phase=match[5],
    )


def check_faults(
    faults: Sequence[Fault], *, num_nodes: int, world_size: int, has_steps: bool = True
) -> None:
    """UserError for a rank, a node or a moment that the job does not have."""
    for fault in faults:
        if fault.seconds is None and not has_steps:
            raise UserError(
                f"--fault {fault}: what a script is doing is not known, so its moment has to be a "
                f"time, such as {fault.kind}:{fault.target}@20s."
            )
        number, what = (world_size, "ranks") if fault.kind in _OF_RANKS else (num_nodes, "nodes")
        if fault.target >= number:
            raise UserError(
                f"--fault {fault}: the job has {number} {what}, numbered from 0 to {number - 1}."
            )


def check_site(faults: Sequence[Fault], *, is_one_machine: bool) -> None:
    """UserError for a process that may be on another machine: its number is somebody else's here."""
    for fault in faults:
        if not is_one_machine and fault.kind not in _WITHOUT_TARGET:
            raise UserError(
                f"--fault {fault}: faults are done to processes of this machine, and the nodes of "
                "this job are others. Rehearse it with --cluster local, which plays the nodes here."
            )


def _do(fault: Fault, processes: Processes) -> bool:
    """False when the process is not there (yet)."""
    if fault.kind == "memory-limit":
        process = processes.ranks.get(fault.target)
        return process is not None and limit_memory(process)
    victims, number = _victims(fault, processes)
    found = [process for process in victims if process is not None]
    for process in found:
        kill_exactly(process, number)
    return bool(found)


def _victims(fault: Fault, processes: Processes) -> tuple[list[Process | None], int]:
    kind, target = fault.kind, fault.target
    if kind in ("kill-rank", "stop-rank", "crash-rank"):
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "crash": signal.SIGSEGV}
        return [processes.ranks.get(target)], signals[kind.partition("-")[0]]
    if kind == "kill-agent":
        return [processes.agents[target]], signal.SIGKILL
    if kind == "kill-fork-server":
        return [processes.servers.get(target)], signal.SIGKILL
    if kind == "hang-node":
        # The agent first: it must not live to tell what becomes of its ranks.
        ranks = [processes.ranks.get(rank) for rank in processes.ranks_of(target)]
        return [processes.agents[target], *ranks], signal.SIGSTOP
    number = signal.SIGINT if kind == "interrupt" else signal.SIGTERM
    return [read_process(os.getpid())], number
