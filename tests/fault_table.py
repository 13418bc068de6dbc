"""What the fault matrix has measured, as the table of docs/faults.md. Printed after the tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

PLACES = ("local", "slurm", "ssh")


@dataclass(slots=True)
class FaultTable:
    """Cells by fault and place: the seconds from the fault until nothing of the job was left."""

    cells: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def add(self, fault: str, place: str, seconds: float) -> None:
        self.cells.setdefault(fault, {}).setdefault(place, []).append(f"{seconds:.1f}")

    def lines(self) -> Iterator[str]:
        """Markdown. A fault that was not tried at a place has a dash there."""
        yield f"| fault | {' | '.join(PLACES)} |"
        yield f"|---|{'---|' * len(PLACES)}"
        for fault, cells in self.cells.items():
            shown = [", ".join(cells.get(place, ["–"])) for place in PLACES]
            yield f"| {fault} | {' | '.join(shown)} |"
