"""Attempts at one job: run the ranks, judge how that ended, try again where it is worth it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ftlaunch.cluster.attempt import Outcome
from ftlaunch.cluster.coordinator import Coordinator
from ftlaunch.cluster.errors import FtlaunchError
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
    # A mistake that shows before the first ranks run is told as such: there is no job yet.
    outcome = attempt()
    while True:
        if outcome.verdict is not None:
            first = outcome.verdict.first
            timeline.add(f"failed: {first.subject}: {first.title}")
        timeline.add("every rank is gone")
        if outcome.verdict is None:
            return outcome
        restart = decide(outcome.verdict.first)
        if restart is None:
            return outcome
        if outcome.stop_signal is not None:
            # What was asked for was not done: neither a stop nor a checkpoint.
            return outcome
        if coordinator.stop_requested:
            # It came after the failure, while the ranks were being ended.
            return _stopped(coordinator, outcome)
        on_restart(restart)
        timeline.add(f"restart {policy.restarts}" if not restart.halves_micro_batch else "restart")
        try:
            if coordinator.replace_lost(least):
                timeline.add(f"{len(coordinator.present or ())} nodes take part")
                reopen()
            if coordinator.stop_requested:
                return _stopped(coordinator, outcome)
            outcome = attempt()
        except (FtlaunchError, OSError) as error:
            return _without_another(outcome, str(error))
        except KeyboardInterrupt:
            return Outcome(ending="interrupted")


def _stopped(coordinator: Coordinator, failed: Outcome) -> Outcome:
    """Instead of another attempt: the failure would have been made good, and what was saved is there."""
    assert failed.verdict is not None
    first = failed.verdict.first
    remark = (
        f"{first.subject}: {first.title}; a stop was asked for, so it is not started again; "
        f"log: {first.log_path}"
    )
    remarks = (*failed.remarks, remark)
    name = coordinator.stop_signal
    return replace(
        failed,
        ending="interrupted" if coordinator.hurried else "stopped",
        verdict=None,
        stop_signal=signal.Signals[name] if name else None,
        remarks=remarks,
    )


def _without_another(outcome: Outcome, why: str) -> Outcome:
    """Of a job that was to go on, and cannot."""
    assert outcome.verdict is not None
    first = outcome.verdict.first
    title = f"{first.title}; it cannot be restarted: {why}"
    return replace(outcome, verdict=replace(outcome.verdict, first=replace(first, title=title)))
