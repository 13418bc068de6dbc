"""The job seen from above: hears the agents of all nodes and decides what happened.

It knows ranks, exits and failures; what ranks say about their work is handed on unread.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ftlaunch.cluster.attempt import Attempt, OnMessage, Outcome
from ftlaunch.cluster.errors import JobError, UserError
from ftlaunch.cluster.events import (
    AskStacks,
    Bind,
    Event,
    Exited,
    Hello,
    Kill,
    Killed,
    Output,
    Prepare,
    RankStart,
    ServerReady,
    Start,
    Started,
    Stop,
)
from ftlaunch.cluster.gathering import (
    Inspection,
    Network,
    connect,
    gather,
    hold_port_on,
    incomplete,
    inspect_nodes,
    why_unreachable,
)
from ftlaunch.cluster.linux import Process, read_process
from ftlaunch.cluster.machine import Machine
from ftlaunch.cluster.mesh import Unreached, find_unreached
from ftlaunch.cluster.nodes import Nodes
from ftlaunch.cluster.transport import Orders, Way

_HELLO_SECONDS = 60.0
_KILL_SECONDS = 10.0
_STACK_SECONDS = 3.0
_POLL_SECONDS = 0.2

OnOutput = Callable[[int, str], None]


class Coordinator:
    """A context manager: on leaving, every agent and every rank is gone.

    allowance   seconds that may pass without a message of any rank; None: any number. The caller
                changes it as the work does
    on_tick     called several times a second while ranks run
    present     the numbers of the nodes that take part; None until they have been met
    ranks, servers, agents    the processes of this machine, for whoever rehearses faults
    """

    def __init__(self, ways: Sequence[Way], orders: Orders, *, log_dir: Path) -> None:
        self._nodes = Nodes(ways, orders, log_dir=log_dir)
        self._signals = self._nodes.signals
        self._log_dir = log_dir
        self._given_up: str | None = None
        self._prepare: Prepare | None = None
        self._attempt: Attempt | None = None
        self._heard_at = 0.0
        self._node_of_rank: dict[int, int] = {}
        self._hellos: dict[int, Hello] = {}
        self.present: tuple[int, ...] | None = None
        self.allowance: float | None = None
        self.on_tick: Callable[[], None] = lambda: None
        self.ranks: dict[int, Process | None] = {}
        self.servers: dict[int, Process | None] = {}

    def __enter__(self) -> Coordinator:
        self._nodes.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._nodes.close(grace_seconds=self._grace_seconds)

    @property
    def stop_requested(self) -> bool:
        return self._signals.count > 0

    @property
    def stop_signal(self) -> str | None:
        """By which a stop was asked for first, of the user or of a scheduler: "SIGUSR1"."""
        first = self._signals.first
        return signal.Signals(first).name if first is not None else None

    @property
    def hurried(self) -> bool:
        """Ctrl-C was pressed again after a first request to stop."""
        return self._signals.hurry

    @property
    def agents(self) -> list[Process | None]:
        return [
            read_process(node.process.pid) if node.lost is None else None for node in self._nodes
        ]

    @property
    def _grace_seconds(self) -> float:
        return self._prepare.grace_seconds if self._prepare is not None else 0.0

    def ranks_of(self, node: int) -> list[int]:
        """The ranks that were started on a node."""
        return [rank for rank, number in self._node_of_rank.items() if number == node]

    # -- before the ranks -------------------------------------------------------------------

    def machines(self) -> list[Machine]:
        """Wait until every agent has said what its machine is; none when a stop was asked for.

        UserError that names every node that cannot be reached.
        """
        self._hellos |= gather(self._nodes, _HELLO_SECONDS, self._note)
        if self.stop_requested:
            return []
        missing = [number for number in range(len(self._nodes)) if number not in self._hellos]
        if missing and self.present is None:
            raise incomplete(self._nodes, missing, _HELLO_SECONDS)
        self.present = tuple(sorted(self._hellos))
        return [self._machine_of(number) for number in self.present]

    def _machine_of(self, number: int) -> Machine:
        try:
            return Machine.from_dict(self._hellos[number].machine)
        except ValueError as error:
            raise UserError(
                f"{self._nodes.names[number]} describes its machine in words of another version of "
                f"ftlaunch ({error}): install the same on all nodes, best in a folder that they share."
            ) from None

    def meet(self) -> tuple[dict[int, Machine], dict[int, str]]:
        """As `machines`, whoever is missing: who is there, and why the others cannot be used.

        What follows is asked of those who are there. None of either when a stop was asked for.
        """
        self._hellos = gather(self._nodes, _HELLO_SECONDS, self._note)
        if self.stop_requested:
            return {}, {}
        found: dict[int, Machine] = {}
        reasons: dict[int, str] = {}
        for number, node in enumerate(self._nodes):
            if number not in self._hellos or node.lost is not None:
                reasons[number] = why_unreachable(node, _HELLO_SECONDS)
                continue
            try:
                found[number] = Machine.from_dict(self._hellos[number].machine)
            except ValueError as error:
                reasons[number] = f"another version of ftlaunch is installed there ({error})"
        for number, reason in reasons.items():
            self._hellos.pop(number, None)
            if self._nodes[number].lost is None:
                self._nodes.give_up(number, reason)
        self.present = tuple(found)
        return found, reasons

    def find_unreached(self, network: Network | None) -> list[Unreached]:
        """Which nodes do not reach which, by the interfaces of `network` or, without one, at all."""
        return find_unreached(self._nodes, self._hellos, network, self._note)

    def connect(self) -> Network:
        """Where the ranks can meet. UserError when the nodes do not reach each other."""
        return connect(self._nodes, self._hellos, self._note)

    def inspect(self, folder: Path, paths: Sequence[str]) -> list[Inspection]:
        """What each node sees of the output folder and of what its ranks will read."""
        return inspect_nodes(self._nodes, sorted(self._hellos), folder, paths, self._note)

    def prepare(self, command: Prepare) -> None:
        """Have the fork servers begin to import what the ranks will need."""
        if command != self._prepare:
            self._prepare = command
            self._nodes.tell(command)

    def bind(self, address: str, port: int, *, listens: bool = True) -> int:
        """Have the first node hold the rendezvous port (`events.Bind`). UserError when it is taken."""
        command = Bind(address=address, port=port, listens=listens)
        return hold_port_on(self._nodes, min(self._hellos), command, self._note)

    def replace_lost(self, least: int) -> bool:
        """Start an agent anew where one is gone; whether the job's nodes are others than before.

        A node that does not come back is left out as long as `least` remain. JobError when they do
        not.
        """
        before = self.present
        for number in self._nodes.replace_lost():
            self._hellos.pop(number, None)
            if self._prepare is not None:
                self._nodes[number].send(self._prepare)
        self._hellos |= gather(self._nodes, _HELLO_SECONDS, self._note)
        for number, node in enumerate(self._nodes):
            if node.lost is not None:
                # Also one that was there and went while the others were waited for.
                self._hellos.pop(number, None)
        missing = [number for number in range(len(self._nodes)) if number not in self._hellos]
        if len(self._hellos) < max(1, least) and not self.stop_requested:
            so = "the job does not go on"
            raise JobError(str(incomplete(self._nodes, missing, _HELLO_SECONDS, so=so)))
        for number in missing:
            if self._nodes[number].lost is None:
                self._nodes.give_up(number, f"silent for {_HELLO_SECONDS:.0f} s")
        self.present = tuple(sorted(self._hellos))
        return self.present != before

    # -- the ranks --------------------------------------------------------------------------

    def run(
        self,
        starts: Sequence[Sequence[RankStart]],
        *,
        on_message: OnMessage,
        on_output: OnOutput,
        on_stop: Callable[[], None],
        stop_seconds: float,
        forwards_signal: bool = False,
    ) -> Outcome:
        """Start the ranks of every node and stay until the last is gone.

        starts            the ranks of each node that is present, in their order
        on_message        called with what a rank says
        on_output         called with what a rank prints, where its start says so
        on_stop           called once when the user asks to stop
        stop_seconds      time for the ranks to stop by themselves, then they are ended
        forwards_signal   ranks get the very signal that the user sent, and pass their exit code
        """
        present = sorted(self._hellos)
        of_node = dict(zip(present, starts, strict=True))
        everywhere = [of_node.get(number, ()) for number in range(len(self._nodes))]
        attempt = Attempt(everywhere, self._nodes.names, passes_code=forwards_signal)
        self._attempt = attempt
        self._given_up = None
        self.ranks.clear()
        self.hear()

        def take(rank: int, payload: Mapping[str, Any]) -> None:
            self.hear()
            on_message(rank, payload)

        for number, ranks in of_node.items():
            node = self._nodes[number]
            node.send(Start(ranks=list(ranks)))
            if node.lost is not None:
                attempt.lose_node(number, node.lost)
        stop_deadline: float | None = None
        while not attempt.over:
            for number, event in self._nodes.poll(min(_POLL_SECONDS, attempt.due_in)):
                node = self._nodes[number]
                if event is None:
                    attempt.lose_node(number, node.lost or "gone")
                elif isinstance(event, Output):
                    self.hear()
                    on_output(event.rank, event.text)
                else:
                    self._note(number, event)
                    attempt.take(number, event, node.clock.offset, take)
            self.on_tick()
            if self._signals.first is not None and stop_deadline is None:
                stop_deadline = time.monotonic() + stop_seconds
                number = self._signals.first if forwards_signal else signal.SIGTERM
                attempt.stop(number)
                on_stop()
                self._nodes.tell(Stop(signal=number))
            if self._signals.hurry:
                self.kill(at_once=True)
                return Outcome(ending="interrupted")
            if stop_deadline is not None and time.monotonic() > stop_deadline:
                title = f"did not stop within {stop_seconds:.0f} s (cluster.stop_timeout_seconds)"
                attempt.end(title)
            elif self.allowance is not None and self._silence > self.allowance:
                self._find_out_who(attempt)
                attempt.stall(self._silence)
            if self._given_up is not None:
                attempt.end(self._given_up)
        self.kill()
        return attempt.outcome()

    def hear(self) -> None:
        """The ranks get on: a message, or another sign of it."""
        self._heard_at = time.monotonic()

    @property
    def _silence(self) -> float:
        return time.monotonic() - self._heard_at

    @property
    def running(self) -> frozenset[int]:
        """The ranks that have not ended."""
        return self._attempt.running if self._attempt is not None else frozenset()

    def give_up(self, reason: str) -> None:
        """End the attempt as failed: the caller cannot do its own part."""
        self._given_up = reason

    def kill(self, *, at_once: bool = False) -> None:
        """End every rank and wait until the agents say that they are gone."""
        waiting = {
            number
            for number, node in enumerate(self._nodes)
            if node.lost is None and node.send(Kill(at_once=at_once))
        }
        for number, event in self._nodes.poll_until(
            self._grace_seconds + _KILL_SECONDS, lambda: bool(waiting)
        ):
            if event is None:
                waiting.discard(number)
            elif isinstance(event, Killed):
                waiting.discard(number)
                if event.survivors:
                    print(f"processes {event.survivors} survive SIGKILL", file=sys.stderr)
        for number in waiting:
            if self._nodes[number].lost is None:
                self._nodes.give_up(number, "did not end its ranks in time")

    def who_holds_up(self, on_message: OnMessage) -> str:
        """While ranks run (on_tick): which of them the others wait for, in words."""
        assert self._attempt is not None
        self._find_out_who(self._attempt, on_message)
        return self._attempt.odd_ranks()[1]

    def _find_out_who(
        self, attempt: Attempt, on_message: OnMessage = lambda rank, payload: None
    ) -> None:
        """Have every rank say where it is."""
        self._nodes.tell(AskStacks())
        for number, event in self._nodes.poll_until(_STACK_SECONDS, lambda: bool(attempt.silent)):
            node = self._nodes[number]
            if event is None:
                attempt.lose_node(number, node.lost or "gone")
            else:
                attempt.take(number, event, node.clock.offset, on_message)

    def _note(self, number: int, event: Event) -> None:
        if isinstance(event, Started):
            self._node_of_rank[event.rank] = number
            self.ranks[event.rank] = read_process(event.pid)
        elif isinstance(event, Exited):
            self.ranks.pop(event.rank, None)
        elif isinstance(event, ServerReady):
            self.servers[number] = read_process(event.pid)
