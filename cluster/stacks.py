"""Where ranks are: their Python stacks, asked for by a signal, and which one is the odd one.

The signal is one that nobody uses; a process that has no handler for it is not sent it, because
its default is to end the process.
"""

from __future__ import annotations

import faulthandler
import re
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ftlaunch.cluster.events import Stack

STACK_SIGNAL = signal.SIGRTMIN + 13
MAX_STACK_BYTES = 1 << 15
_FRAME = re.compile(r'^  File "(.*?)", line (\d+) in (.*)$', re.MULTILINE)
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x", re.MULTILINE)


def answer_stack_signal() -> None:
    """In a rank: write the Python stack of every thread to stderr when asked, even inside a C call."""
    faulthandler.register(STACK_SIGNAL, all_threads=True, chain=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({self.file.rpartition('/')[2]}:{self.line})"


def main_thread_frames(text: str) -> list[Frame]:
    """Of the main thread, innermost first. faulthandler writes it last."""
    starts = [match.start() for match in _THREAD.finditer(text)]
    if not starts:
        return []
    return [
        Frame(file=file, line=int(line), function=function)
        for file, line, function in _FRAME.findall(text[starts[-1] :])
    ]


def odd_ranks(stacks: Mapping[int, Stack]) -> tuple[list[int], str]:
    """(the ranks that hold up the others, in words what is seen).

    A rank that does not answer is the odd one; else those whose innermost call is not the most
    common one. No rank when all are at the same place.
    """
    silent = [rank for rank, stack in sorted(stacks.items()) if not stack.text]
    if silent:
        return silent, _silent_in_words(silent, stacks)
    places = {rank: _place(main_thread_frames(s.text)) for rank, s in sorted(stacks.items())}
    if not places:
        return [], "no rank could be asked where it is"
    (common, count), *_ = Counter(places.values()).most_common(1)
    odd = [rank for rank, place in places.items() if place != common]
    if not odd:
        return [], f"every rank is in {common}"
    if len(places) == 2 and count == 1:
        # One against one: whoever is not waiting for a collective holds up the other.
        odd = [r for r, place in places.items() if not _COLLECTIVE.search(place)] or odd
        common = next((p for r, p in places.items() if r not in odd), common)
    where = "; ".join(f"rank {rank} is in {places[rank]}" for rank in odd[:4])
    rest = len(places) - len(odd)
    return odd, f"{where}; the other {rest} {'is' if rest == 1 else 'are'} in {common}"


# Calls in which a rank waits for the others.
_COLLECTIVE = re.compile(
    r"all_?reduce|all_?gather|reduce|broadcast|barrier|wait|backward|_run_step"
)


def _place(frames: Sequence[Frame]) -> str:
    return str(frames[0]) if frames else "no Python code"


def _silent_in_words(silent: Sequence[int], stacks: Mapping[int, Stack]) -> str:
    return "; ".join(
        f"rank {rank} does not answer: its process is {stacks[rank].state}" for rank in silent[:4]
    )
