"""What single operations of a step cost on this CPU, one thread, milliseconds of processor time.

    python -m benchmarks.kernels

attention   forward and backward of 8 rows, 12 heads of 32, with dropout of 0.1: torch's own, widened to
            fp32 or not, and written out, with torch's random numbers or bytes of numpy's SFC64
adamw       a step over 22 M parameters in 100 matrices: fused, by foreach, one after the other
seeds       of a micro-batch: `torch.manual_seed` and the generator alone
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch.nn import functional

from benchmarks.report import machine_line, markdown_table
from ftlaunch.strategies.torch.attention import ByteDropout

_DROPOUT = 0.1
_THRESHOLD = round(_DROPOUT * 65536)


def milliseconds(run: Callable[[], object], *, rounds: int = 7, times: int = 2) -> float:
    run()
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        for _ in range(times):
            run()
        taken.append((time.process_time() - started) / times)
    return 1e3 * median(taken)


def attention_rows() -> list[list[str]]:
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for length in (64, 128, 256):
            rows.append([f"{str(dtype)[6:]}, {length} tokens", *_attention(dtype, length)])
    return rows


def _attention(dtype: torch.dtype, length: int) -> list[str]:
    query, key, value = (
        torch.randn(8, 12, length, 32, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    gradient = torch.randn(8, 12, length, 32, dtype=dtype)

    def whole(probability: float) -> torch.Tensor:
        found: torch.Tensor = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=probability
        )
        return found

    def written_out(drop: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        scores = torch.matmul(query * 32**-0.5, key.transpose(-1, -2))
        return torch.matmul(drop(torch.softmax(scores, -1)), value)

    def both(forward: Callable[[], torch.Tensor]) -> str:
        def run() -> None:
            torch.autograd.grad(forward(), (query, key, value), gradient)

        return f"{milliseconds(run):.1f}"

    def without_widening() -> str:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        try:
            return both(lambda: whole(_DROPOUT))
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)

    return [
        both(lambda: whole(0.0)),
        both(lambda: whole(_DROPOUT)),
        without_widening(),
        both(lambda: written_out(lambda each: functional.dropout(each, _DROPOUT))),
        both(lambda: written_out(lambda each: ByteDropout.apply(each, _THRESHOLD))),  # type: ignore[no-untyped-call]
    ]


def adamw_row() -> list[str]:
    found = []
    for arguments in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        parameters = [torch.zeros(469, 469, requires_grad=True) for _ in range(100)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(parameters, **arguments)  # type: ignore[arg-type]
        found.append(f"{milliseconds(optimizer.step):.1f}")
    return found


def seed_row() -> list[str]:
    ways: list[Callable[[], object]] = [
        lambda: torch.manual_seed(5),
        lambda: torch.default_generator.manual_seed(5),
    ]
    return [f"{milliseconds(way, times=200):.4f}" for way in ways]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    torch.set_num_threads(1)
    print(machine_line(), end="\n\n")
    header = (
        *("attention", "torch, no dropout", "torch, widened", "torch, not widened"),
        *("written out", "written out, bytes"),
    )
    print(markdown_table(header, attention_rows()), end="\n\n")
    print(markdown_table(("AdamW: fused", "foreach", "one by one"), [adamw_row()]), end="\n\n")
    print(markdown_table(("manual_seed", "the generator's"), [seed_row()]))


if __name__ == "__main__":
    main()
