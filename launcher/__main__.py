"""The `ftlaunch` command, also as `python -m ftlaunch.launcher`."""

from __future__ import annotations

import sys


def main() -> int:
    try:
        from ftlaunch.launcher.cli import run

        return run(sys.argv[1:])
    except KeyboardInterrupt:
        return 130  # also while modules are still being imported: no traceback for a Ctrl-C


if __name__ == "__main__":
    sys.exit(main())
