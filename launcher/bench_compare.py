"""The peers of a benchmark: which are asked for, their runs beside ours, and how ours compare."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlaunch.cluster.errors import FtlaunchError, UserError
from ftlaunch.launcher.bench_cells import Cell
from ftlaunch.launcher.bench_peers import check_peer, run_program
from ftlaunch.launcher.bench_report import (
    CellResult,
    samples_per_second,
    spread,
    tokens_per_second,
)
from ftlaunch.launcher.peer_work import check_comparable, make_peer_work, plan_tokens
from ftlaunch.launcher.plan import LaunchPlan
from ftlaunch.launcher.wording import one_line, short_number
from ftlaunch.strategies.data.token_cache import Tokens
from ftlaunch.strategies.progress import Measured

# So often each side is measured where nobody says how often.
ROUNDS = 5
_PEER_SECONDS = 1800.0


@dataclass(slots=True, kw_only=True)
class PeerResult:
    """A peer on the work of one cell. `rounds` are the pairs of a run of ours and one of its."""

    peer: str
    cell: Cell
    rounds: list[tuple[Measured, Mapping[str, Any]]] = field(default_factory=list)
    why: str = ""

    def ratios(self) -> list[float]:
        """Tokens a second, padding not counted, ours over the peer's, of each round."""
        return [
            tokens_per_second(ours) / float(peer["tokens_per_second"]) for ours, peer in self.rounds
        ]

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "peer": self.peer,
            "cell": self.cell.name,
            "failure": self.why or None,
            "repeats": [dict(peer) for _, peer in self.rounds],
        }
        if self.rounds:
            for name in ("samples_per_second", "tokens_per_second"):
                content[name] = spread([float(peer[name]) for _, peer in self.rounds]).to_json()
            content["ratio"] = spread(self.ratios()).to_json()
        return content


def read_peers(text: str | None) -> tuple[str, ...]:
    """ "hf,torchrun" as names. UserError for one that is no peer, cannot run here, or stands twice."""
    if text is None:
        return ()
    names = [name.strip() for name in text.split(",")]
    for name in names:
        check_peer(name)
    if len(set(names)) != len(names):
        raise UserError(f"--compare {text[:80]!r} names a peer twice. Name each once.")
    return tuple(names)


class Comparison:
    """Runs the peers on the work of each cell, right after each of our own runs."""

    def __init__(self, peers: Sequence[str], folder: Path) -> None:
        self._peers = peers
        self._folder = folder
        self._works: dict[Cell, dict[str, Any]] = {}
        self.results: dict[tuple[str, Cell], PeerResult] = {}

    def run(self, cell: Cell, plan: LaunchPlan, ours: Measured, number: int) -> list[str]:
        """One round; a line for each peer. A peer that fails once is not run again on this cell."""
        lines = []
        for peer in self._peers:
            result = self.results.setdefault((peer, cell), PeerResult(peer=peer, cell=cell))
            if result.why:
                continue
            try:
                found = self._run(peer, cell, plan, number)
            except FtlaunchError as error:
                result.why = one_line(str(error))
                lines.append(f"{cell.name}, {peer} failed: {result.why[:300]}")
                continue
            result.rounds.append((ours, found))
            lines.append(
                f"{cell.name}, {peer}: {short_number(float(found['samples_per_second']))} samples/s, "
                f"{short_number(float(found['tokens_per_second']))} tokens/s; ours / {peer} "
                f"{result.ratios()[-1]:.2f}"
            )
        return lines

    def _run(self, peer: str, cell: Cell, plan: LaunchPlan, number: int) -> Mapping[str, Any]:
        folder = self._folder / "peers" / cell.name
        if cell not in self._works:
            check_comparable(plan, on_one_machine=True)
            # It is there where the work could not be made for another peer.
            folder.mkdir(parents=True, exist_ok=True)
            bench = plan.options.bench
            self._works[cell] = make_peer_work(
                plan,
                _tokens(plan),
                folder,
                warmup_steps=bench.warmup_steps,
                steps=bench.steps,
            )
        return run_program(
            peer,
            self._works[cell],
            ranks=plan.world_size,
            folder=folder / peer / str(number + 1),
            timeout_seconds=_PEER_SECONDS,
        ).result


def _tokens(plan: LaunchPlan) -> Tokens:
    from ftlaunch.strategies.data.synthetic import synthetic_tokens

    if plan.options.data.name_or_path is None:
        return synthetic_tokens(plan.options)
    return plan_tokens(plan)


def peer_lines(results: Sequence[CellResult], peers: Sequence[PeerResult]) -> list[str]:
    """For the terminal: ours and each peer, cell by cell, with how ours compare."""
    rows = [("cell", "", "samples/s (range)", "tokens/s", "padding", "ours / peer (range)")]
    for result in results:
        own = [each for each in peers if each.cell == result.cell and each.rounds]
        if not result.runs or not own:
            continue
        rows.append((result.cell.name, "ftlaunch", *_rates(result.runs), ""))
        for each in own:
            ratio = spread(each.ratios())
            rates = _peer_rates([peer for _, peer in each.rounds])
            compared = f"{ratio.median:.2f} ({ratio.lowest:.2f}–{ratio.highest:.2f})"
            rows.append((result.cell.name, each.peer, *rates, compared))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines = lines if len(rows) > 1 else []
    return lines + [f"{p.peer} failed on {p.cell.name}: {p.why[:300]}" for p in peers if p.why]


def _rates(runs: Sequence[Measured]) -> tuple[str, str, str]:
    padding = 1 - sum(r.num_tokens for r in runs) / sum(r.num_padded_tokens for r in runs)
    return _words(
        [samples_per_second(run) for run in runs], [tokens_per_second(run) for run in runs], padding
    )


def _peer_rates(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    return _words(
        [float(run["samples_per_second"]) for run in runs],
        [float(run["tokens_per_second"]) for run in runs],
        statistics.fmean(float(run["padding_share"]) for run in runs),
    )


def _words(
    samples: Sequence[float], tokens: Sequence[float], padding: float
) -> tuple[str, str, str]:
    of = spread(samples)
    return (
        f"{short_number(of.median)} ({short_number(of.lowest)}–{short_number(of.highest)})",
        short_number(statistics.median(tokens)),
        f"{100 * padding:.1f} %",
    )
