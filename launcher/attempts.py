"""Attempts at one job: run the ranks, judge how that ended, try again where it is worth it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ftlaunch.cluster.attempt import Outcome
from ftlaunch.cluster.coordinator import Coordinator
from ftlaunch.cluster.verdict import Failure
from ftlaunch.launcher.restarts import Restart, RestartPolicy


@dataclass(slots=True)
class Timeline:
    """What happened to a job's processes, with the seconds since its command began."""

    started: float
    events: list[tuple[float, str]] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.events.append((time.monotonic() - self.started, text))

    def lines(self) -> list[str]:
        return [f"{seconds:8.2f} s  {text}" for seconds, text in self.events]


def run_attempts(
    coordinator: Coordinator,
    policy: RestartPolicy,
    timeline: Timeline,
    attempt: Callable[[], Outcome],
    decide: Callable[[Failure], Restart | None],
    on_restart: Callable[[Restart], None],
    reopen: Callable[[], None],
    *,
    least: int,
) -> Outcome:
    """The outcome of the last attempt.

    attempt      starts the ranks and stays until they are gone
    decide       whether a failure is worth another attempt
    on_restart   told before the next one
    reopen       makes a new plan when the nodes are not those of before
    least        with so many of them it goes on
    """
    while True:
        outcome = attempt()
        if outcome.verdict is not None:
            first = outcome.verdict.first
            timeline.add(f"failed: {first.subject}: {first.title}")
        timeline.add("every rank is gone")
        if outcome.verdict is None or coordinator.stop_requested:
            return outcome
        restart = decide(outcome.verdict.first)
        if restart is None:
            return outcome
        on_restart(restart)
        timeline.add(f"restart {policy.restarts}" if not restart.halves_micro_batch else "restart")
        if coordinator.replace_lost(least):
            timeline.add(f"{len(coordinator.present or ())} nodes take part")
            reopen()
        if coordinator.stop_requested:
            return outcome
