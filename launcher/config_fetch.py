"""config.json of a model that the hub has, brought into the hub's cache before a job is planned.

In a process of its own: the hub's library is slow to import, writes to the terminal as it likes, and
asks again for minutes where nothing answers. Loads no framework.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

from ftlaunch.cluster.errors import EXIT_USER_MISTAKE, UserError
from ftlaunch.cluster.transport import python_command
from ftlaunch.launcher.job_memory import cached_config
from ftlaunch.strategies.model_config import config_from_hub, looks_local
from ftlaunch.strategies.options import ModelOptions

# A small file. Who needs longer plans without it, as if there were no network.
_SECONDS = 30.0


def fetch_config(
    options: ModelOptions, say: Callable[[str], None], *, seconds: float = _SECONDS
) -> str:
    """Have it where `read_config_json` looks. In words why it could not be had; empty where it is there,
    where the model is no hub's, and where the environment forbids to ask.

    Nothing is refused: the ranks need more of the model than this, and say what they miss.
    """
    name = options.name_or_path
    if name is None or looks_local(name):
        return ""
    # Not before: a model of this machine needs nothing of that library.
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ""
    if cached_config(name, options.revision) is not None:
        return ""
    say(f"fetching config.json of {name} from the hub")
    failed = f"config.json of the model {name!r} could not be had from the hub"
    try:
        found = subprocess.run(
            python_command(__name__, name, options.revision or "", str(seconds)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{failed} within {seconds:.0f} s."
    except (OSError, ValueError) as error:  # ValueError: no word of a command line
        return f"{failed}: {getattr(error, 'strerror', None) or error}."
    if found.returncode == EXIT_USER_MISTAKE:
        return found.stdout.decode(errors="replace").strip()
    return "" if found.returncode == 0 else f"{failed}: its library failed."


def main() -> int:
    """NAME REVISION SECONDS, the revision empty for the hub's own choice. What is wrong is on stdout."""
    name, revision, seconds = sys.argv[1:]
    # Should the one who waits be killed.
    signal.alarm(int(float(seconds)) + 1)
    try:
        config_from_hub(name, revision or None)
    except UserError as error:
        os.write(1, str(error).encode(errors="replace"))
        return EXIT_USER_MISTAKE
    return 0
