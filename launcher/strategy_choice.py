"""Which strategy, with or without checkpointing and offload: as asked for, or the fastest that fits. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ftlaunch.cluster.errors import UserError
from ftlaunch.cluster.machine import Machine
from ftlaunch.launcher.cluster_size import no_room, smallest_in_words
from ftlaunch.launcher.config import RunConfig
from ftlaunch.launcher.job_memory import JobMemory
from ftlaunch.launcher.layout import Layout, Reason
from ftlaunch.launcher.memory_fit import Room, Way, Work, find_room, measure
from ftlaunch.launcher.memory_table import MemoryRow, MemoryTable, gib
from ftlaunch.launcher.micro_batch import Fits, choose_micro_batch
from ftlaunch.launcher.precision import choose_precision
from ftlaunch.strategies.deepspeed_config import buffers_of, offload_devices, stage_of
from ftlaunch.strategies.memory.settings import MAX_SIZE
from ftlaunch.strategies.registry import STRATEGIES, entry

# From the fastest to the one that takes least of a device. Computing activations again costs a third of
# the time; the way to the host's memory and its optimizer cost more.
_ON_DEVICE = ("ddp", "zero1", "zero2", "zero3", "mindspore")
_OFFLOADED = ("zero2", "zero3")
_PARTS = {
    "zero1": "the optimizer state is in {} parts",
    "zero2": "optimizer state and gradients are in {} parts",
    "zero3": "weights, gradients and optimizer state are in {} parts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen.

    config   what was asked for, with gradient checkpointing and offload as they were chosen
    fits     rows of the longest length that a device holds at once; None where nobody knows, or where
             all that are wanted fit
    """

    strategy: str
    config: RunConfig
    table: MemoryTable | None
    fits: Fits | None
    reasons: tuple[Reason, ...]


def choose_strategy(
    config: RunConfig,
    machines: Sequence[Machine],
    layout: Layout,
    *,
    is_one_machine: bool,
    memory: JobMemory | None,
) -> Choice:
    """memory   None: the job does not train, or nobody looked at the model

    UserError for a strategy that does not run here, and when nothing fits that `auto` may choose.
    """
    asked, why = _named(config, layout.accelerator)
    usual, usual_why = (asked, why) if asked else _usual(machines, layout.accelerator)
    plain = Choice(
        strategy=usual,
        config=config,
        table=None,
        fits=None,
        reasons=(Reason(choice="strategy", value=usual, why=usual_why),),
    )
    if memory is None:
        return plain
    counts = [host.num_devices for host in layout.hosts]
    room = find_room(machines, counts, is_one_machine=is_one_machine)
    if memory.architecture is None:
        table = MemoryTable(capacity=room.capacity, usable=room.usable, why_not=memory.why_not)
        return replace(plain, table=table)
    chooser = _Chooser(
        config,
        machines,
        layout,
        room,
        memory,
        is_one_machine=is_one_machine,
        asked=asked,
        usual=usual,
    )
    return chooser.choose(plain, num_machines=1 if is_one_machine else len(machines))


def _named(config: RunConfig, accelerator: str) -> tuple[str | None, str]:
    """(the strategy that the user named somewhere, why)."""
    named, origin, why = config.strategy, f"--strategy {config.strategy}", "as asked for"
    if named == "auto":
        named = f"zero{stage_of(config.deepspeed)}"
        origin, why = f"deepspeed.config asks for {named}, which", "by deepspeed.config"
        if named not in STRATEGIES:
            return None, ""
    if accelerator not in entry(named).accelerators:
        left_out = "deepspeed.config" if config.strategy == "auto" else "--strategy"
        raise UserError(
            f"{origin} does not run on {accelerator}: it runs on "
            f"{', '.join(entry(named).accelerators)}. Leave {left_out} out."
        )
    return named, why


def _usual(machines: Sequence[Machine], accelerator: str) -> tuple[str, str]:
    """What is taken where memory is no matter: nobody gets DeepSpeed then without having asked for it."""
    fitting = [
        name
        for name, each in STRATEGIES.items()
        if accelerator in each.accelerators and each.zero_stage is None
    ]
    # Where torch is missing MindSpore may be there. What lacks everything is told of the first.
    installed = [
        name
        for name in fitting
        if all(STRATEGIES[name].package in machine.versions for machine in machines)
    ]
    chosen = (installed or fitting)[0]
    why = "every rank holds the whole model; gradients are averaged once an optimizer step"
    if chosen != fitting[0]:
        why += f"; {STRATEGIES[fitting[0]].package} is not installed"
    return chosen, why


def _lacking_package(strategy: str, machines: Sequence[Machine]) -> str:
    """What keeps it from being run; empty: nothing."""
    needed = entry(strategy)
    for machine in machines:
        for package in (needed.package, *needed.also):
            if package not in machine.versions:
                return f"{package} is not installed"
        if not needed.is_new_enough(machine.versions[needed.package]):
            return f"{needed.package} is older than {needed.at_least}"
    return ""


class _Chooser:
    """All ways of one job, measured."""

    def __init__(
        self,
        config: RunConfig,
        machines: Sequence[Machine],
        layout: Layout,
        room: Room,
        memory: JobMemory,
        *,
        is_one_machine: bool,
        asked: str | None,
        usual: str,
    ) -> None:
        self._config = config
        self._machines = machines
        self._layout = layout
        self._room = room
        self._is_one_machine = is_one_machine
        self._asked = asked
        self._usual = usual
        self._memory = memory
        assert memory.architecture is not None, "there is nothing to choose by"
        self._architecture = memory.architecture
        self._work = _work(config, layout, memory)

    def choose(self, plain: Choice, *, num_machines: int) -> Choice:
        """num_machines   real ones: on one that plays several nodes 1"""
        plainly, more = self._ways()
        ways = [*plainly, *more]
        rows = [self._measured(way) for way in plainly]
        mine = [row for row in rows if self._may_be_chosen(row)]
        chosen = next((row for row in mine if row.fits), None)
        if chosen is None:
            further = [self._measured(way) for way in more]
            rows += further
            mine += [row for row in further if self._may_be_chosen(row)]
            chosen = next((row for row in mine if row.fits), None)
        if chosen is None:
            chosen = self._none_fits(rows, mine, ways, num_machines)
        table = MemoryTable(
            capacity=self._room.capacity,
            usable=self._room.usable,
            num_parameters=self._architecture.num_parameters,
            num_trained=self._num_trained(),
            family=self._architecture.family,
            is_bound=not self._architecture.known,
            lacks_head=self._config.task if self._architecture.lacks_head else "",
            length=self._memory.length,
            rows=tuple(replace(row, chosen=row is chosen) for row in rows),
            warnings=self._warnings(chosen, rows, ways, num_machines),
        )
        reasons = self._reasons(plain, chosen, rows)
        return Choice(
            strategy=chosen.strategy,
            config=_applied(self._config, chosen),
            table=table,
            fits=self._fits(chosen),
            reasons=reasons,
        )

    # -- the ways ---------------------------------------------------------------------------

    def _ways(self) -> tuple[list[Way], list[Way]]:
        """(those that are always shown, those that are looked at when none of these fits), in order."""
        asked_checkpointing = self._config.model.gradient_checkpointing
        later = asked_checkpointing is None and self._architecture.known
        with_it = bool(asked_checkpointing)
        names = [name for name in _ON_DEVICE if self._runs(name)]
        plainly = [self._way(name, offload=False, checkpointing=with_it) for name in names]
        offloads = self._offloads()
        if offloads is not None:
            # The user's own word: the strategies that have it, have it.
            plainly = [
                _offloading(way, *offloads.get(way.strategy, (False, False))) for way in plainly
            ]
        more = []
        if later:
            more += [replace(way, checkpointing=True) for way in plainly if _can_recompute(way)]
        if offloads is None and self._layout.accelerator != "cpu":
            far = [
                self._way(n, offload=True, checkpointing=with_it) for n in _OFFLOADED if n in names
            ]
            more += far
            if later:
                more += [replace(way, checkpointing=True) for way in far]
        return plainly, more

    def _offloads(self) -> dict[str, tuple[bool, bool]] | None:
        """Strategy → whether the user has its optimizer state and its weights offloaded; None: nothing was
        said of it.
        """
        options = self._config.deepspeed
        if options.offload is None and options.config is None:
            return None
        found = {}
        for stage in (1, 2, 3):
            optimizer, parameters = offload_devices(options, stage)
            found[f"zero{stage}"] = (optimizer == "cpu", parameters == "cpu" and stage == 3)
        return found

    def _way(self, strategy: str, *, offload: bool, checkpointing: bool) -> Way:
        precision, _ = choose_precision(
            self._config, self._machines, self._layout.accelerator, strategy
        )
        can = strategy != "mindspore"
        way = Way(strategy=strategy, precision=precision, checkpointing=checkpointing and can)
        return _offloading(way, offload, offload and strategy == "zero3")

    def _runs(self, strategy: str) -> bool:
        """Whether it is for this accelerator, in the precision that was asked for, and for this task."""
        if strategy in (self._asked, self._usual):
            return True
        each, accelerator = entry(strategy), self._layout.accelerator
        if accelerator not in each.accelerators:
            return False
        if each.package == "mindspore" or self._usual == "mindspore":
            return False
        precision = self._config.precision
        return precision == "auto" or each.runs(precision, accelerator)

    @property
    def _is_bound_to_usual(self) -> bool:
        """DeepSpeed's own keys are set without a strategy, which is refused later."""
        options = self._config.deepspeed
        return options.config is not None or options.offload == "cpu"

    def _measured(self, way: Way) -> MemoryRow:
        remark = _lacking_package(way.strategy, self._machines)
        return measure(way, self._work, self._room, remark)

    def _may_be_chosen(self, row: MemoryRow) -> bool:
        if self._asked is not None:
            named = (self._offloads() or {}).get(row.strategy, ())
            return row.strategy == self._asked and row.offload == any(named)
        if not self._room.usable or self._is_bound_to_usual:
            return row.strategy == self._usual
        return row.strategy == self._usual or not row.remark

    # -- the outcome ------------------------------------------------------------------------

    def _none_fits(
        self,
        rows: Sequence[MemoryRow],
        mine: Sequence[MemoryRow],
        ways: Sequence[Way],
        num_machines: int,
    ) -> MemoryRow:
        """The row that is taken all the same. UserError where the choice was ours, and not by a bound.

        mine   those of the rows that may be chosen
        """
        if not self._is_ours:
            return next(row for row in rows if row.strategy == (self._asked or self._usual))
        if not self._architecture.known:
            # What it really takes is less: the one that lacks least is the one that may fit.
            return min(mine, key=lambda row: (row.lacking + row.host_lacking, row.peak))
        raise UserError(
            no_room(
                rows,
                ways,
                self._work,
                self._room,
                num_machines=num_machines,
                is_one_machine=self._is_one_machine,
                device=self._layout.hosts[0].device_name,
                global_batch_size=self._config.train.global_batch_size,
            )
        )

    @property
    def _is_ours(self) -> bool:
        """Whether the user left the strategy to us."""
        return self._asked is None and not self._is_bound_to_usual

    def _warnings(
        self,
        chosen: MemoryRow,
        rows: Sequence[MemoryRow],
        ways: Sequence[Way],
        num_machines: int,
    ) -> tuple[str, ...]:
        if chosen.fits:
            return ()
        bound = "" if self._architecture.known else "at most "
        text = (
            f"{chosen.label} does not fit by the estimate: a rank needs {bound}{gib(chosen.peak)} GiB, and "
            f"{gib(self._room.usable)} are counted on"
        )
        if chosen.host_lacking:
            text += (
                f"; {gib(chosen.host)} GiB of the host's memory for each rank, where {gib(self._room.host)} "
                "are counted on"
            )
        if self._is_ours:
            uninstalled = next((row for row in rows if row.fits), None)
            if uninstalled is not None:
                text += f". {uninstalled.label} would fit, but {uninstalled.remark}"
            else:
                words, _ = smallest_in_words(
                    ways,
                    self._work,
                    self._room,
                    num_machines=num_machines,
                    is_one_machine=self._is_one_machine,
                )
                text += f". {words}"
        return (f"{text}. It is started all the same: an estimate is no measurement.",)

    def _reasons(
        self, plain: Choice, chosen: MemoryRow, rows: Sequence[MemoryRow]
    ) -> tuple[Reason, ...]:
        reasons = plain.reasons
        if self._asked is None and chosen.strategy != self._usual:
            why = "weights that compute stand beside masters in fp32"
            if self._layout.world_size > 1:
                why = _PARTS[chosen.strategy].format(self._layout.world_size)
            if chosen.fits:
                why += _passed_over(rows[: rows.index(chosen)], self._room.usable)
            else:
                why += "; nothing fits for sure, and this lacks least"
            reasons = (Reason(choice="strategy", value=chosen.strategy, why=why),)
        if chosen.gradient_checkpointing and not self._config.model.gradient_checkpointing:
            what = chosen.strategy if self._asked is not None else "nothing"
            on_device = "" if chosen.offload or self._asked is not None else " on the devices alone"
            does = "does not fit" if self._asked is not None else "fits"
            why = f"{what} {does}{on_device} without: activations are computed a second time"
            reasons += (Reason(choice="checkpointing", value="on", why=why),)
        return reasons

    def _fits(self, chosen: MemoryRow) -> Fits | None:
        if chosen.micro_batch >= self._work.rows:
            return None
        return Fits(samples=chosen.micro_batch, length=self._memory.length)

    def _num_trained(self) -> int:
        is_trained = self._memory.is_trained
        return sum(
            tensor.num_elements
            for tensor in self._architecture.tensors
            if is_trained is None or is_trained(tensor.name)
        )


def _passed_over(rows: Sequence[MemoryRow], usable: int) -> str:
    """Why none of the faster ways was taken: the one that came nearest, and those that lack a package."""
    text = ""
    missing = {row.remark: row.strategy for row in reversed(rows) if row.fits and row.remark}
    for remark, strategy in missing.items():
        text += f"; {strategy} would fit, but {remark}"
    too_large = [row for row in rows if not row.fits]
    if too_large:
        nearest = min(too_large, key=lambda row: row.lacking + row.host_lacking)
        text += (
            f"; nothing faster fits: {nearest.label} needs {gib(nearest.peak)} GiB of {gib(usable)}"
        )
    return text


def _can_recompute(way: Way) -> bool:
    return way.strategy != "mindspore"


def _offloading(way: Way, optimizer: bool, parameters: bool) -> Way:
    return replace(way, offload_optimizer=optimizer, offload_parameters=parameters)


def _work(config: RunConfig, layout: Layout, memory: JobMemory) -> Work:
    wanted = choose_micro_batch(config, layout.world_size, layout.accelerator)
    rows = wanted.samples
    if wanted.tokens:
        rows = min(rows, max(1, wanted.tokens // memory.length))
    train = config.train
    return Work(
        memory=memory,
        accelerator=layout.accelerator,
        world_size=layout.world_size,
        share=-(-train.global_batch_size // layout.world_size),
        rows=min(rows, MAX_SIZE),
        fixed=train.per_device_train_batch_size is not None
        or bool(train.max_tokens_per_micro_batch),
        attention=config.model.attn_implementation,
        zero=buffers_of(config.deepspeed),
    )


def _applied(config: RunConfig, chosen: MemoryRow) -> RunConfig:
    if chosen.gradient_checkpointing and not config.model.gradient_checkpointing:
        config = replace(config, model=replace(config.model, gradient_checkpointing=True))
    if chosen.offload and config.deepspeed.offload is None and config.deepspeed.config is None:
        config = replace(config, deepspeed=replace(config.deepspeed, offload="cpu"))
    return config
