"""The memory model beside real ranks: bytes that torch's allocator hands out, predicted and measured.

    python -m benchmarks.memory [--model bert-base,decoder-100m] [--strategy ddp,zero2,zero3]
        [--length 64,512] [--rows 1,16] [--checkpointing off,on] [--precision fp32] [--micro-batches 1]

Two ranks of our own strategies, gloo on the CPU, random weights. Each cell is some steps of one short row,
for what is made once, and a full one, in processes of its own, one cell after the other. What is measured is
the most that is alive at a time in the steps, by torch's own events of its allocator (`torch.profiler`,
`profile_memory`): not resident memory, which holds the interpreter's, the libraries' and what the heap keeps.
Making the model and the strategy is left out: on an accelerator that is another memory. Nothing is timed.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import machine_line, markdown_table
from ftlaunch.cluster.ports import hold_port
from ftlaunch.cluster.world import World
from ftlaunch.launcher.job_memory import with_adapter, without_frozen
from ftlaunch.strategies.base import Batch, StrategyRequest
from ftlaunch.strategies.memory.architecture import read_architecture
from ftlaunch.strategies.memory.estimate import MemoryEstimate, estimate
from ftlaunch.strategies.memory.request import MemoryRequest
from ftlaunch.strategies.options import JobOptions, LoraOptions, ModelOptions, TrainOptions
from ftlaunch.strategies.registry import load

RANKS = 2
# DeepSpeed's stage 3 keeps no weights whole for their next use until it has recorded the order of the
# modules, which takes a pass to find that a language model's head was only looked at, and another one.
_STEPS = 4
_SECONDS = 580.0
# name → (the task's head, config.json)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("sequence-classification", {"model_type": "bert", "pad_token_id": 0}),
    # 12 layers of 640 and a tied vocabulary of 50,304: 100 M parameters.
    "decoder-100m": (
        "causal-lm",
        {
            "model_type": "llama",
            "vocab_size": 50304,
            "hidden_size": 640,
            "intermediate_size": 1920,
            "num_hidden_layers": 14,
            "num_attention_heads": 10,
            "num_key_value_heads": 5,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One job. `head` and `config`: the model; `micro_batches` of a step; ranks from `full_ranks` on get
    one short row, and are not measured; `freeze` as model.freeze.
    """

    name: str
    head: str
    config: dict[str, Any]
    strategy: str
    length: int
    rows: int
    checkpointing: bool
    precision: str = "fp32"
    micro_batches: int = 1
    attention: str | None = None
    num_outputs: int = 2
    full_ranks: int = RANKS
    freeze: tuple[str, ...] = ()
    lora: LoraOptions = field(default_factory=LoraOptions)

    def request(self) -> MemoryRequest:
        architecture = read_architecture(self.config, head=self.head, num_outputs=self.num_outputs)
        trainable = without_frozen(architecture, self.freeze)
        if self.lora.r is not None:
            architecture, trainable = with_adapter(architecture, self.lora)
        return MemoryRequest(
            architecture=architecture,
            trainable=trainable,
            strategy=self.strategy,
            precision=self.precision,
            accelerator="cpu",
            world_size=RANKS,
            micro_batch=self.rows,
            length=self.length,
            accumulates=self.micro_batches > 1,
            gradient_checkpointing=self.checkpointing,
            attention=self.attention,
        )


def predict(cell: Cell) -> MemoryEstimate:
    return estimate(cell.request())


# -- one rank -----------------------------------------------------------------------------------


def measure_rank(world: World, listen_fd: int | None, cell: Cell, folder: Path) -> dict[str, int]:
    """Collective: the most bytes alive at a time in each phase: "create", "accumulate", "apply"."""
    import torch

    (folder / "config.json").write_text(json.dumps(cell.config))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        with torch.autograd.profiler.record_function("phase create"):
            strategy = load(cell.strategy)(_request(world, listen_fd, cell, folder))
        for step in range(_STEPS):
            # What a first step does once (moments, buckets, the order of modules) needs no full rows.
            is_full = step == _STEPS - 1 and world.rank < cell.full_ranks
            size = (cell.rows, cell.length) if is_full else (1, 8)
            with torch.autograd.profiler.record_function("phase accumulate"):
                for number in range(cell.micro_batches):
                    batch = _batch(cell, size, [step, number, world.rank])
                    total = float(batch.weights.sum()) * world.size * cell.micro_batches
                    last = number == cell.micro_batches - 1
                    strategy.accumulate(batch, total, last=last)
            with torch.autograd.profiler.record_function("phase apply"):
                strategy.apply(1e-5)
    return peaks(profiler)


def peaks(profiler: Any) -> dict[str, int]:
    """Phase → the most bytes that were alive in it, from the events of torch's allocator.

    A thread of gloo's may free what the rank allocated, of which the profiler does not hear: what lies
    where something new is put is gone.
    """
    import torch

    allocation = torch._C._profiler._EventType.Allocation
    events: list[tuple[int, str, int, int]] = []
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        kind, fields = event.typed
        if kind == allocation:
            events.append((event.start_time_ns, "", fields.ptr, fields.alloc_size))
        elif event.name.startswith("phase "):
            events.append((event.start_time_ns, event.name.removeprefix("phase "), 0, 0))
    places: list[int] = []
    sizes: dict[int, int] = {}
    alive, phase = 0, ""
    found: dict[str, int] = {}
    for _, name, place, size in sorted(events, key=lambda each: each[0]):
        phase = name or phase
        if size < 0 and place in sizes:
            places.pop(bisect.bisect_left(places, place))
            alive -= sizes.pop(place)
        elif size > 0:
            first = bisect.bisect_left(places, place)
            if first and places[first - 1] + sizes[places[first - 1]] > place:
                first -= 1
            last = bisect.bisect_left(places, place + size)
            alive += size - sum(sizes.pop(gone) for gone in places[first:last])
            places[first:last] = [place]
            sizes[place] = size
        found[phase] = max(found.get(phase, 0), alive)
    return found


def _request(world: World, listen_fd: int | None, cell: Cell, folder: Path) -> StrategyRequest:
    model = ModelOptions(
        name_or_path=str(folder),
        random_weights=True,
        gradient_checkpointing=cell.checkpointing,
        attn_implementation=cell.attention,
        freeze=cell.freeze,
    )
    is_language_model = cell.head in ("causal-lm", "masked-lm")
    outputs = 0 if is_language_model else cell.num_outputs
    return StrategyRequest(
        world=world,
        options=JobOptions(model=model, train=TrainOptions(learning_rate=1e-5), lora=cell.lora),
        precision=cell.precision,  # type: ignore[arg-type]
        accelerator="cpu",
        device=world.local_rank,
        num_threads=1,
        listen_fd=listen_fd,
        timeout_seconds=_SECONDS,
        loss="cross_entropy" if cell.head == "sequence-classification" else "token_cross_entropy",
        head=cell.head,
        num_outputs=outputs,
        label_names=tuple(str(number) for number in range(outputs)),
        max_token_id=0,
        pad_token_id=0,
    )


def _batch(cell: Cell, size: tuple[int, int], seed: list[int]) -> Batch:
    """Random tokens; every row but the first is padded a little, as sorted rows of a real job are."""
    rows, length = size
    generator = np.random.default_rng(seed)
    ids = generator.integers(3, cell.config.get("vocab_size", 30522), size)
    lengths = np.maximum(1, length - np.minimum(np.arange(rows), length // 8))
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    ids = np.where(mask == 1, ids, 0)
    if cell.head == "sequence-classification":
        labels = generator.integers(0, cell.num_outputs, rows)
        weights = np.ones(rows, dtype=np.float32)
    else:
        labels = np.where(mask == 1, ids, -100)
        if cell.head == "token-classification":
            labels = np.where(mask == 1, ids % cell.num_outputs, -100)
        elif cell.head == "masked-lm":
            labels = np.where(generator.random(size) < 0.15, labels, -100)
            labels[0, 0] = ids[0, 0]
        weights = (labels != -100).astype(np.float32)
    return Batch(
        inputs={"input_ids": ids, "attention_mask": mask},
        labels=labels,
        weights=weights,
        indices=np.arange(rows),
        seed=seed[0] * 1000 + seed[1] * 10 + seed[2],
    )


# -- all ranks ----------------------------------------------------------------------------------


def measure(cell: Cell) -> list[dict[str, int]]:
    """Of every rank. RuntimeError with the traceback of one that failed."""
    context = multiprocessing.get_context("fork")
    listener = hold_port("127.0.0.1", 0)
    with tempfile.TemporaryDirectory(prefix="ftlaunch-memory-") as folder:
        started = []
        for rank in range(RANKS):
            world = World(
                rank=rank,
                size=RANKS,
                local_rank=rank,
                local_size=RANKS,
                node_rank=0,
                num_nodes=1,
                master_address="127.0.0.1",
                master_port=listener.getsockname()[1],
            )
            place = Path(folder) / str(rank)
            place.mkdir()
            receiver, sender = context.Pipe(duplex=False)
            fd = listener.fileno() if rank == 0 else None
            process = context.Process(target=_rank, args=(sender, world, fd, cell, place))
            process.start()
            sender.close()
            started.append((process, receiver))
        listener.close()
        try:
            return [_answer(receiver) for _, receiver in started]
        finally:
            for process, _ in started:
                process.kill()
                process.join(10)


def _answer(receiver: Any) -> dict[str, int]:
    if not receiver.poll(_SECONDS):
        raise RuntimeError(f"a rank did not answer within {_SECONDS:.0f} s")
    try:
        found = receiver.recv()
    except EOFError:
        raise RuntimeError("a rank died without a word: is there enough memory?") from None
    if isinstance(found, str):
        raise RuntimeError(found)
    assert isinstance(found, dict)
    return found


def _rank(sender: Any, world: World, listen_fd: int | None, cell: Cell, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        sender.send(measure_rank(world, listen_fd, cell, folder))
    except BaseException:  # noqa: BLE001 - shown by the parent
        sender.send(traceback.format_exc())
    sender.close()
    os._exit(0)


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    axes = itertools.product(
        arguments.model.split(","),
        arguments.strategy.split(","),
        (int(each) for each in arguments.length.split(",")),
        (int(each) for each in arguments.rows.split(",")),
        arguments.checkpointing.split(","),
        arguments.precision.split(","),
    )
    return [
        Cell(
            name=model,
            head=MODELS[model][0],
            config=MODELS[model][1],
            strategy=strategy,
            length=length,
            rows=rows,
            checkpointing=checkpointing == "on",
            precision=precision,
            micro_batches=arguments.micro_batches,
            full_ranks=arguments.full_ranks,
        )
        for model, strategy, length, rows, checkpointing, precision in axes
    ]


_HEADER = ["model", "strategy", "length", "rows", "checkpointing", "precision"]


def _row(cell: Cell, predicted: int, measured: int) -> list[str]:
    return [
        cell.name,
        cell.strategy,
        str(cell.length),
        str(cell.rows),
        "on" if cell.checkpointing else "off",
        cell.precision + (f", {cell.micro_batches} micro-batches" * (cell.micro_batches > 1)),
        f"{predicted / 2**20:,.0f}",
        f"{measured / 2**20:,.0f}",
        f"{predicted / measured:.3f}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default=",".join(MODELS))
    parser.add_argument("--strategy", default="ddp,zero2,zero3")
    parser.add_argument("--length", default="64,512")
    parser.add_argument("--rows", default="1,16")
    parser.add_argument("--checkpointing", default="off,on")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument(
        "--full-ranks", type=int, default=RANKS, help="1: only rank 0 works and is measured"
    )
    parser.add_argument("--json", type=Path, help="one line for each cell, added to this file")
    arguments = parser.parse_args(argv)
    # Imported here once, not by every rank of every cell.
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch._dynamo  # noqa: F401
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if arguments.strategy != "ddp":
        import deepspeed  # noqa: F401
    rows = []
    for cell in _cells(arguments):
        predicted = predict(cell)
        found = measure(cell)
        measured = max(max(rank["accumulate"], rank["apply"]) for rank in found[: cell.full_ranks])
        rows.append(_row(cell, predicted.tensors, measured))
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
        if arguments.json is not None:
            line = {
                **asdict(cell),
                "predicted": asdict(predicted),
                "tensors": predicted.tensors,
                "measured": found,
            }
            with arguments.json.open("a") as file:
                print(json.dumps(line), file=file)
    print(machine_line())
    print()
    print(markdown_table([*_HEADER, "predicted, MiB", "measured, MiB", "ratio"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
