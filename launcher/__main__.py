"""The `ftlaunch` command, also as `python -m ftlaunch.launcher`."""

from __future__ import annotations

import sys


def main() -> int:
    from ftlaunch.launcher.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
