"""How numbers and untrusted text are written for people; nothing about where they are shown."""

from __future__ import annotations

import math
import re

# CSI, the string sequences (OSC, DCS, APC, PM, SOS) with their payload, then any other escape.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
# C0 and C1 without newline and tab, and the marks that reorder or hide what follows them.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plain_text(text: str) -> str:
    """`text` without escape sequences, control characters and lone surrogates.

    Newlines and tabs stay. Of a line that a progress bar rewrote with carriage returns, the last
    state stays.
    """
    text = text.replace("\r\n", "\n")
    text = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
    return _SURROGATES.sub("?", _CONTROLS.sub("", _ESCAPES.sub("", text)))


def one_line(text: str) -> str:
    """`plain_text` with its lines joined by spaces."""
    return " ".join(plain_text(text).split())


def short_number(value: float) -> str:
    """At most three or four significant digits: 12.3k, 4.5M, 0.912, 2e-05."""
    if not math.isfinite(value):
        return "inf" if value > 0 else "-inf" if value < 0 else "nan"
    size = abs(value)
    for unit, suffix in _SUFFIXES:
        # 999.95 is the first value that three digits round up to 1,000.
        if size >= unit * 0.99995:
            return f"{_three_digits(value / unit)}{suffix}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}" if size < 1 else _three_digits(value)


def duration(seconds: float) -> str:
    """0.4s, 12s, 3m 12s, 2h 05m, 3d 04h."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def _three_digits(value: float) -> str:
    size = abs(value)
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
