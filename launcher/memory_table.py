"""What a job would take of each device, way by way, as a table for people and for plan.json."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
_PARTS = (
    ("weights", "weights"),
    ("masters", "masters"),
    ("gradients", "grads"),
    ("optimizer", "optim."),
    ("activations", "activ."),
    ("logits", "logits"),
    ("buckets", "buckets"),
    ("framework", "other"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One way to run the job; bytes on the fullest device.

    micro_batch   rows of the longest length at once: the most that fit of those that are wanted, else 1
    peak          what has to fit: not always the sum, since not all exists at the same time
    host          in the memory of the host, for each rank
    lacking       bytes by which the device is too small; 0 where it fits, or its size is not known
    host_lacking  the same of the host, for each rank
    remark        why this way cannot be had here; empty: it can
    """

    strategy: str
    precision: str
    offload: bool
    gradient_checkpointing: bool
    micro_batch: int
    weights: int
    masters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buckets: int
    framework: int
    peak: int
    host: int
    lacking: int
    host_lacking: int
    remark: str
    chosen: bool = False

    @property
    def fits(self) -> bool:
        return not (self.lacking or self.host_lacking)

    @property
    def label(self) -> str:
        """For the user: zero3 + checkpointing + offload."""
        more = " + checkpointing" if self.gradient_checkpointing else ""
        return f"{self.strategy}{more}{' + offload' if self.offload else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTable:
    """All ways that were considered.

    capacity   bytes of a device; on CPUs of the machine, divided by its ranks. 0: not known
    usable     what of them is counted on
    why_not    why nothing is estimated; empty where it is
    is_bound   the family is not known: the numbers are upper bounds
    lacks_head the task, where the family is known, but not with a head for it; else empty
    length     tokens of the longest row
    warnings   sentences for the user
    """

    capacity: int
    usable: int
    num_parameters: int = 0
    num_trained: int = 0
    family: str = ""
    is_bound: bool = False
    length: int = 0
    why_not: str = ""
    rows: tuple[MemoryRow, ...] = ()
    warnings: tuple[str, ...] = ()
    lacks_head: str = ""

    @property
    def chosen(self) -> MemoryRow | None:
        return next((row for row in self.rows if row.chosen), None)


def gib(size: int) -> str:
    """In GiB with two digits, without the unit."""
    return f"{size / GIB:,.2f}"


def short_line(table: MemoryTable) -> tuple[str, str]:
    """(what a device needs, of what and for what) of the chosen way."""
    row = table.chosen
    if row is None:
        return "not known", table.why_not
    most = "at most " if table.is_bound else ""
    of = f"of {gib(table.capacity)} that a rank has; " if table.capacity else "for each rank; "
    state = row.weights + row.masters + row.gradients + row.optimizer
    why = f"{of}{gib(state)} of weights, gradients and optimizer, {gib(row.activations + row.logits)} of "
    why += f"activations with {row.micro_batch} row(s) of {table.length:,} tokens"
    if row.host:
        why += f"; {gib(row.host)} in the host's memory for each rank"
    return f"{most}{gib(row.peak)} GiB", why + _bound_note(table)


def table_lines(table: MemoryTable) -> list[str]:
    """The whole of it for the terminal."""
    if table.why_not:
        return [f"memory is not estimated: {table.why_not}"]
    trained = (
        "all trained"
        if table.num_trained == table.num_parameters
        else f"{table.num_trained:,} of them trained"
    )
    lines = [
        f"memory of each rank in GiB, by config.json alone: {table.num_parameters:,} parameters, {trained}; "
        f"rows of {table.length:,} tokens",
    ]
    if table.capacity:
        lines.append(
            f"{gib(table.capacity)} there, {gib(table.usable)} counted on; needed is the most at any "
            "moment, not the sum"
        )
    else:
        lines.append("how much a rank has is not known; needed is the most at any moment")
    if table.is_bound:
        lines.append(f"{_bound_note(table).removeprefix('; ')}: every number is an upper bound")
    head = ["", "rows", *(title for _, title in _PARTS), "needed", ""]
    cells = [head, *(_cells(row, known=bool(table.capacity)) for row in table.rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head) - 1)]
    for line in cells:
        first, *numbers = (
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line[:-1], widths, strict=True))
        )
        lines.append(f"  {first}  {'  '.join(numbers)}  {line[-1]}".rstrip())
    return lines


def _bound_note(table: MemoryTable) -> str:
    if not table.is_bound:
        return ""
    if table.lacks_head:
        return f"; a bound: {table.family!r} is not known here with a head for {table.lacks_head}"
    return f"; a bound: the family {table.family!r} is not known"


def _cells(row: MemoryRow, *, known: bool) -> list[str]:
    if row.lacking:
        verdict = f"{gib(row.lacking)} too much"
    elif row.host_lacking:
        verdict = f"{gib(row.host_lacking)} too much for the host, each rank"
    else:
        verdict = "fits" if known else ""
    if row.host:
        verdict += f"{', ' if verdict else ''}{gib(row.host)} in the host's memory"
    if row.chosen:
        verdict += f"{', ' if verdict else ''}chosen"
    if row.remark:
        verdict += f"{', ' if verdict else ''}{row.remark}"
    values = (gib(getattr(row, part)) for part, _ in _PARTS)
    return [row.label, str(row.micro_batch), *values, gib(row.peak), verdict]
