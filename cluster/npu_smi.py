"""What `npu-smi info` prints, read: the chips, their health and memory, and whose processes use them.

Knows no host: text in, records out. Whatever cannot be read is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

_BUS_ID = re.compile(r"[0-9A-Fa-f]{4}:[0-9A-Za-z]{2}:[0-9A-Za-z]{2}\.\d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One chip, which is one device to a program.

    npu, number   of the card, and the physical one: /dev/davinciN has it, and a rank table names it
    name          without "Ascend": 910A, 910B3, 310P3
    health        as printed; "OK" when it is
    occupant      the processes that use it, in words; empty: none
    """

    npu: int
    number: int
    name: str
    bus_id: str
    health: str
    memory_mib: int
    occupant: str = ""


def read_driver_version(output: str) -> str | None:
    found = re.search(r"\bVersion:\s*([\w.]{1,40})", output)
    return found[1] if found else None


def read_chips(output: str) -> list[Chip]:
    """In the order of the table, which is that of ASCEND_RT_VISIBLE_DEVICES."""
    above, _, below = output.partition("Process id")
    chips = list(_read_chips(above))
    users = _read_processes(below)
    places = _places(chips)
    return [
        replace(chip, occupant=_in_words(users[place])) if place in users else chip
        for place, chip in zip(places, chips, strict=True)
    ]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _read_chips(table: str) -> Iterator[Chip]:
    """A chip takes two rows, of three cells each:

        | NPU  Name        | Health  | Power(W)  Temp(C)  Hugepages-Usage(page)    |
        | Chip [Phy-ID]    | Bus-Id  | AICore(%)  Memory-Usage(MB) [HBM-Usage(MB)] |

    Where there is HBM its usage comes last; the other memory is then that of the control CPU. The
    950 has a cell of its own for the number. Without Phy-ID a card has one chip, or is an old one.
    """
    npu: re.Match[str] | None = None
    health = ""
    for line in table.splitlines():
        cells = _cells(line)
        if len(cells) == 4:
            cells = [f"{cells[0]} {cells[1]}".strip(), *cells[2:]]
        if len(cells) != 3:
            continue
        if not _BUS_ID.fullmatch(cells[1]):
            npu = re.fullmatch(r"(\d{1,6})\s+([\w.-]{1,40})", cells[0])
            health = cells[1][:40]
            continue
        usages = re.findall(r"\d+\s*/\s*(\d{1,9})\b", cells[2])
        if npu is None or not usages:
            continue
        physical = re.fullmatch(r"\d{1,6}\s+(\d{1,6})", cells[0])
        yield Chip(
            npu=int(npu[1]),
            number=int(physical[1] if physical else npu[1]),
            name=re.sub(r"^Ascend[ _-]?", "", npu[2]),
            bus_id=cells[1],
            health=health,
            memory_mib=int(usages[-1]),
        )
        npu = None


def _places(chips: list[Chip]) -> list[tuple[int, int]]:
    """(card, chip on it), as the table of processes has it."""
    seen: dict[int, int] = {}
    places = []
    for chip in chips:
        on_card = seen.get(chip.npu, 0)
        places.append((chip.npu, on_card))
        seen[chip.npu] = on_card + 1
    return places


def _read_processes(table: str) -> dict[tuple[int, int], list[str]]:
    """By place; the 950 prints no chip:

    | NPU     Chip     | Process id    | Process name    | Process memory(MB)  [...] |
    """
    found: dict[tuple[int, int], list[str]] = {}
    for line in table.splitlines():
        cells = _cells(line)
        place = re.fullmatch(r"(\d{1,6})(?:\s+(\d{1,2}))?", cells[0])
        if len(cells) < 4 or place is None or not re.fullmatch(r"\d{1,10}", cells[1]):
            continue
        name = re.sub(r"[^\w.:/ -]", "?", cells[2][:40])
        process = f"process {cells[1]}" + (f" ({name})" if name else "")
        found.setdefault((int(place[1]), int(place[2] or 0)), []).append(process)
    return found


def _in_words(processes: list[str]) -> str:
    more = len(processes) - 3
    return ", ".join(processes[:3]) + (f" and {more} more" if more > 0 else "")
