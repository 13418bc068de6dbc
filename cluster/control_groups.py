"""What the kernel lets this process have: the limits of its control groups, versions 1 and 2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def memory_limit(root: Path) -> int:
    """Bytes that this process may use, all its control groups considered."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in control_groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (limit := read_text(folder / name).strip()).isdecimal():
                size = min(size, int(limit))
    return size


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be had without anything being swapped out or killed, by what is known."""
    size = memory_limit(root)
    for line in read_text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            size = min(size, int(value.split()[0]) * 1024)
    for folder in control_groups(root, "memory"):
        limit, used = (read_text(folder / f"memory.{name}").strip() for name in ("max", "current"))
        if limit.isdecimal() and used.isdecimal():
            # Clean pages of files give way.
            found = [x for x in read_text(folder / "memory.stat").split("\n") if "_file" in x]
            files = sum(int(x.split()[1]) for x in found if x.startswith("inactive_file "))
            size = min(size, int(limit) - int(used) + files)
    return max(0, size)


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups this process is in: a limit may stand on any of them."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        # Version 2 has one line without controllers, version 1 a tree for each.
        if controllers and controller not in controllers.split(","):
            continue
        tree = root / "sys/fs/cgroup" / (controller if controllers else "")
        inner = PurePosixPath(group.lstrip("/"))
        # In a container the path may be the host's: only the root of the tree is then there.
        yield from (tree / path for path in (inner, *inner.parents))


def read_text(path: Path) -> str:
    """The text of a small file, empty when it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
