"""Which failures are worth another attempt. Pure: what happened goes in, a decision comes out."""

from __future__ import annotations

from dataclasses import dataclass

from ftlaunch.cluster.verdict import Failure

# Nobody's code is to blame: the same attempt may well succeed.
OUTSIDE = ("signal", "lost", "stall")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Try again. `why` is one line for the user."""

    why: str
    halves_micro_batch: bool = False


@dataclass(slots=True, kw_only=True)
class RestartPolicy:
    """Counts the restarts of one job.

    A code error stops at once. What came from outside is tried again up to `max_restarts` times,
    but not twice in a row without a step between: that would repeat for ever. Want of memory is
    answered with half the micro-batch, which ends by itself at one sample and is not counted.
    """

    max_restarts: int
    restarts: int = 0
    _was_outside: bool = False

    def decide(
        self, failure: Failure, *, progressed: bool, can_halve: bool, goes_on: str
    ) -> Restart | None:
        """None: stop.

        progressed   a step was done since the ranks were started last
        can_halve    the micro-batch has more than one sample
        goes_on      from where: "the checkpoint of step 20"
        """
        what = f"{failure.subject}: {failure.title}"
        if failure.cause == "memory" and can_halve:
            return Restart(
                why=f"{what}; going on from {goes_on} with half the micro-batch",
                halves_micro_batch=True,
            )
        if failure.cause not in OUTSIDE or self.restarts >= self.max_restarts:
            return None
        if self._was_outside and not progressed:
            return None
        self._was_outside = True
        self.restarts += 1
        return Restart(why=f"{what}; restart {self.restarts} of {self.max_restarts} from {goes_on}")
