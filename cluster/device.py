"""One device of a host, and which of them a variable leaves visible. Knows no vendor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    # Unique on its host; where a vendor has names for devices, that name.
    identifier: str
    name: str
    memory_bytes: int
    fast_bf16: bool
    # The physical number, where the vendor has one: N of /dev/davinciN.
    number: int | None = None
    # The processes that use it, in words; empty: none, or the vendor was not asked.
    occupant: str = ""


def visible_devices(
    environ: Mapping[str, str],
    variable: str,
    devices: Sequence[Device],
    look_up: Callable[[str], Device | None],
    kind: str,
    notes: list[str],
) -> list[Device]:
    """The devices that `variable` leaves, in its order, by the rules of the CUDA driver.

    The list ends at the first entry that `look_up` does not know; an entry that occurs twice leaves
    no device at all. `kind` is what `notes` call a device.
    """
    value = environ.get(variable)
    if value is None or not devices:
        return list(devices)
    chosen: list[Device] = []
    for entry in value.split(","):
        device = look_up(entry.strip())
        if device is None:
            if entry.strip() not in ("", "-1"):
                notes.append(f"{variable}={value!r} ends at {entry.strip()!r}: no such {kind}.")
            break
        if device in chosen:
            notes.append(f"{variable}={value!r} names one {kind} twice, which hides all of them.")
            chosen = []
            break
        chosen.append(device)
    if (hidden := len(devices) - len(chosen)) > 0:
        are = f"{kind} is" if hidden == 1 else f"{kind}s are"
        notes.append(f"{hidden} {are} hidden by {variable}={value!r}.")
    return chosen


def device_by_index(entry: str, devices: Sequence[Device]) -> Device | None:
    # Drivers read numbers like strtoul: "1x" is 1.
    number = re.match(r"\+?(\d{1,6})", entry)
    if number is None or int(number[1]) >= len(devices):
        return None
    return devices[int(number[1])]
