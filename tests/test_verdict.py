"""Who was first, what followed from it, and the words for it."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest

from ftlaunch.cluster.attempt import Attempt
from ftlaunch.cluster.clock import Clock
from ftlaunch.cluster.events import Exited, FromRank, RankStart, ServerGone, Stack
from ftlaunch.cluster.rank_pipe import RankPipe, cause_of, failure_payload
from ftlaunch.cluster.stacks import main_thread_frames, odd_ranks
from ftlaunch.cluster.verdict import (
    Failure,
    exit_in_words,
    judge,
    ranks_in_words,
    signal_in_words,
)

LOST = "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]"


def _failure(rank, cause, title, time):
    return Failure(
        rank=rank,
        node="n",
        subject=f"rank {rank} on n",
        cause=cause,
        title=title,
        traceback="",
        log_path="",
        time=time,
    )


def test_the_first_failure_is_not_the_one_that_lost_its_peer():
    lost = _failure(0, "exception", LOST, 1.0)
    killed = _failure(1, "signal", "killed by SIGKILL", 1.2)
    own = _failure(2, "exception", "ValueError: boom", 1.4)
    assert judge([lost, killed, own]).first is killed
    assert judge([lost, own]).first is own
    # Whoever arrived first: what counts is when it happened.
    assert judge([own, killed]).first is killed
    assert judge([lost]).first is lost


def test_what_followed_is_told_once_for_each_rank():
    first = _failure(2, "exception", "ValueError: boom", 1.0)
    again = _failure(2, "exit", "exit code 1", 1.1)
    lost = [_failure(rank, "exception", LOST, 1.2 + rank) for rank in (3, 0, 1)]
    verdict = judge([*lost, again, first])
    assert verdict.first is first
    assert [failure.rank for failure in verdict.consequences] == [0, 1, 3]


def test_words():
    assert signal_in_words(9) == "killed by SIGKILL"
    assert "segmentation fault" in signal_in_words(11)
    assert signal_in_words(10) == "ended by SIGUSR1"
    assert signal_in_words(99) == "ended by signal 99"
    assert exit_in_words(-9) == "killed by SIGKILL"
    assert exit_in_words(3) == "exit code 3"
    assert ranks_in_words([3]) == "rank 3"
    assert ranks_in_words([5, 0, 1, 2, 7]) == "ranks 0-2, 5, 7"


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MemoryError(), "memory"),
        (OutOfMemoryError("CUDA out of memory"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory"),
        (RuntimeError("Allocate memory failed, size [412316860416]"), "memory"),
        (RuntimeError("Memory not enough: Device(id:0) memory isn't enough"), "memory"),
        (RuntimeError("std::bad_alloc"), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "memory"),
        (RuntimeError("NCCL: Failed to CUDA calloc 6291456 bytes"), "memory"),
        (RuntimeError("Memory_Allocation_Failure(EL0004): Failed to allocate"), "memory"),
        (RuntimeError("Failed to allocate device memory"), "memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "exception"),
        (RuntimeError("Failed to allocate a port"), "exception"),
        (ValueError("out of memory"), "exception"),
        (RuntimeError("shape mismatch"), "exception"),
    ],
)
def test_want_of_memory_is_a_cause_of_its_own(error, cause):
    assert cause_of(error) == cause


# -- an attempt ---------------------------------------------------------------------------------


def _attempt(num_ranks=2, **options):
    starts = [
        [
            RankStart(
                rank=rank,
                title="",
                module="m",
                arguments=[],
                env={},
                working_dir=None,
                log_path=f"/logs/{rank}",
                inherits_listener=False,
                shows_output=False,
            )
        ]
        for rank in range(num_ranks)
    ]
    return Attempt(starts, [f"node{n}" for n in range(num_ranks)], **options)


def _said(rank, cause, title, time):
    payload = {**failure_payload(cause, title, "trace"), "time": time}
    return FromRank(rank=rank, payload=payload, time=time + 1)


def test_a_node_speaks_for_its_own_ranks_only():
    attempt = _attempt()
    said = []
    for rank in (0, 7, -1):
        attempt.take(1, _said(rank, "exception", "ValueError: not mine", 1.0), 0.0, None)
        attempt.take(1, Exited(rank=rank, code=1, signal=None, time=1.0), 0.0, None)
        attempt.take(
            1, FromRank(rank=rank, payload={}, time=1.0), 0.0, lambda *words: said.append(words)
        )
    assert not attempt.failures
    assert not said
    assert attempt.running == {0, 1}


def test_the_time_is_the_ranks_own_on_the_coordinators_clock():
    attempt = _attempt()
    # Node 1's clock is 100 s ahead. Its rank failed 20 ms before that of node 0, and was heard later.
    attempt.take(0, _said(0, "exception", "ValueError: zero", 50.02), 0.0, None)
    attempt.take(1, _said(1, "exception", "ValueError: one", 150.0), 100.0, None)
    verdict = attempt.outcome().verdict
    assert (verdict.first.subject, verdict.first.title) == ("rank 1 on node1", "ValueError: one")
    assert verdict.first.traceback == "trace"
    assert [each.rank for each in verdict.consequences] == [0]


def test_an_exit_that_follows_from_an_exception_gives_its_code():
    attempt = _attempt(passes_code=True)
    attempt.take(0, _said(0, "exception", "ValueError: zero", 1.0), 0.0, None)
    attempt.take(0, Exited(rank=0, code=1, signal=None, time=1.1), 0.0, None)
    assert [(f.title, f.code) for f in attempt.failures] == [("ValueError: zero", 1)]
    assert not attempt.over  # the others are heard for a moment


def test_exits():
    attempt = _attempt()
    attempt.take(0, Exited(rank=0, code=0, signal=None, time=1.0), 0.0, None)
    assert not attempt.over
    attempt.take(1, Exited(rank=1, code=0, signal=None, time=1.0), 0.0, None)
    assert attempt.over
    assert attempt.outcome().ending == "done"
    attempt = _attempt()
    attempt.take(1, Exited(rank=1, code=None, signal=9, time=1.0, out_of_memory="2 GiB"), 0, None)
    first = attempt.outcome().verdict.first
    assert (first.cause, first.code) == ("memory", 137)
    assert "for want of memory: 2 GiB" in first.title


def test_a_fork_server_that_is_gone_takes_its_ranks_along():
    attempt = _attempt(3)
    attempt.take(1, ServerGone(pid=7, how="killed by SIGKILL", time=1.0), 0.0, None)
    first = attempt.outcome().verdict.first
    assert first.subject == "the fork server on node1 (process 7)"
    assert (first.cause, first.title) == ("lost", "killed by SIGKILL")
    assert attempt.running == {0, 2}
    # Played nodes share it, and only the one that started it knows how it ended.
    attempt = _attempt(2)
    attempt.take(1, ServerGone(pid=7, how="gone", time=1.0), 0.0, None)
    attempt.take(0, ServerGone(pid=7, how="killed by SIGKILL", time=1.1), 0.0, None)
    verdict = attempt.outcome().verdict
    assert (verdict.first.title, verdict.consequences) == ("killed by SIGKILL", ())
    assert attempt.running == set()
    # Killed before it had told either who it is.
    for order in ((0, 1), (1, 0)):
        attempt = _attempt(2)
        events = [
            ServerGone(pid=0, how="gone", time=1.0),
            ServerGone(pid=7, how="killed by SIGKILL", time=1.0),
        ]
        for node in order:
            attempt.take(node, events[node], 0.0, None)
        verdict = attempt.outcome().verdict
        assert (verdict.first.title, verdict.consequences) == ("killed by SIGKILL", ())
        assert verdict.first.subject == "the fork server on node1 (process 7)"
        assert (verdict.first.rank, verdict.first.node) == (1, "node1")


def test_a_stop_is_no_failure():
    attempt = _attempt()
    attempt.stop(signal.SIGTERM)
    attempt.take(0, Exited(rank=0, code=75, signal=None, time=1.0), 0.0, None)
    attempt.take(1, Exited(rank=1, code=None, signal=15, time=1.0), 0.0, None)
    assert attempt.outcome().ending == "stopped"


def test_an_outcome_tells_a_stop_that_failed_from_one_that_came_too_late():
    crash = Exited(rank=1, code=None, signal=11, time=1.0)
    stopped_first, failed_first = _attempt(), _attempt()
    stopped_first.stop(signal.SIGTERM)
    stopped_first.take(1, crash, 0.0, None)
    failed_first.take(1, crash, 0.0, None)
    failed_first.stop(signal.SIGTERM)
    assert stopped_first.outcome().stop_signal == signal.SIGTERM
    assert failed_first.outcome().stop_signal is None
    assert stopped_first.outcome().ending == failed_first.outcome().ending == "failed"


# -- stalls -------------------------------------------------------------------------------------


def _stack(rank, *frames, state="sleeping"):
    lines = [f'  File "/x/{file}", line {line} in {name}' for file, line, name in frames]
    text = "Thread 0x1 (most recent call first):\n" + '  File "/x/t.py", line 1 in helper\n\n'
    text += "Current thread 0x2 (most recent call first):\n" + "\n".join(lines) + "\n"
    return Stack(rank=rank, text=text if frames else "", state=state)


def test_the_main_thread_is_the_last_one():
    frames = main_thread_frames(_stack(0, ("a.py", 3, "inner"), ("b.py", 4, "outer")).text)
    assert [str(frame) for frame in frames] == ["inner (a.py:3)", "outer (b.py:4)"]
    assert main_thread_frames("nothing") == []


def test_the_odd_rank_is_the_one_that_is_elsewhere():
    reduce = (("dist.py", 10, "all_reduce"), ("train.py", 5, "main"))
    load = (("data.py", 7, "load"), ("train.py", 4, "main"))
    stacks = {0: _stack(0, *reduce), 1: _stack(1, *reduce), 2: _stack(2, *load)}
    odd, words = odd_ranks(stacks)
    assert odd == [2]
    assert words == "rank 2 is in load (data.py:7); the other 2 are in all_reduce (dist.py:10)"
    # One against one: whoever waits in a collective waits for the other.
    odd, words = odd_ranks({0: _stack(0, *load), 1: _stack(1, *reduce)})
    assert odd == [0]
    assert "the other 1 is in all_reduce" in words
    assert odd_ranks({0: _stack(0, *reduce), 1: _stack(1, *reduce)})[0] == []


def test_a_rank_that_does_not_answer_is_the_odd_one():
    stacks = {0: _stack(0, ("a.py", 1, "wait")), 1: _stack(1, state="stopped by a signal")}
    odd, words = odd_ranks(stacks)
    assert odd == [1]
    assert words == "rank 1 does not answer: its process is stopped by a signal"


# -- clocks and pipes ---------------------------------------------------------------------------


def test_the_shortest_round_trip_tells_the_clock_best():
    clock = Clock()
    clock.compare(sent=10.0, theirs=115.0, received=12.0)
    assert clock.offset == pytest.approx(104.0)
    clock.compare(sent=20.0, theirs=125.1, received=20.2)
    assert clock.offset == pytest.approx(105.0)
    clock.compare(sent=30.0, theirs=150.0, received=39.0)
    assert clock.offset == pytest.approx(105.0)


def test_one_machine_has_one_clock():
    clock = Clock()
    with open("/proc/sys/kernel/random/boot_id") as file:
        clock.meet(file.read().strip())
    clock.compare(sent=1.0, theirs=50.0, received=1.1)
    assert clock.offset == 0.0


def test_a_rank_tells_its_agent():
    reading, writing = os.pipe()
    pipe = RankPipe(writing)
    pipe.send({"kind": "note", "text": "ü\n"})
    assert json.loads(os.read(reading, 1000)) == {"kind": "note", "text": "ü\n"}
    os.close(reading)
    pipe.send({"kind": "note"})  # nobody listens any more: no error
    os.close(writing)
    RankPipe(None).send({"kind": "note"})
