"""The command line: which command, and what does it. It imports nothing but argparse until it knows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ftlaunch.launcher.parsers import (
    build_bench_parser,
    build_cancel_parser,
    build_doctor_parser,
    build_eval_parser,
    build_logs_parser,
    build_merge_parser,
    build_parser,
    build_plan_parser,
    build_rehearse_parser,
    build_status_parser,
    build_submit_parser,
)

# Flags that say what to do rather than what the run is.
_NOT_SETTINGS = (
    "config",
    "dry_run",
    "overwrite",
    "overrides",
    "version",
    "target",
    "module",
    "script",
    "fault",
    "json",
    "hardware",
    "compare",
)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, by their names as keys."""
    return {
        name: value
        for name, value in vars(arguments).items()
        if name not in _NOT_SETTINGS and value is not None
    }


def parse(argv: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """(command, its arguments). argparse itself ends with exit code 2 for a flag it does not know."""
    if argv and argv[0] == "eval":
        return argv[0], build_eval_parser().parse_intermixed_args(list(argv[1:]))
    if argv and argv[0] == "bench":
        return argv[0], build_bench_parser().parse_intermixed_args(list(argv[1:]))
    if argv and argv[0] == "doctor":
        return argv[0], build_doctor_parser().parse_intermixed_args(list(argv[1:]))
    if argv and argv[0] == "merge":
        arguments = build_merge_parser().parse_args(list(argv[1:]))
        if arguments.verify and (arguments.dtype or arguments.model):
            build_merge_parser().error("--verify compares what is there: it takes no other flag")
        return argv[0], arguments
    about_a_job = {
        "status": build_status_parser,
        "logs": build_logs_parser,
        "cancel": build_cancel_parser,
    }
    if argv and argv[0] in about_a_job:
        return argv[0], about_a_job[argv[0]]().parse_args(list(argv[1:]))
    starting = {
        "plan": build_plan_parser,
        "rehearse": build_rehearse_parser,
        "submit": build_submit_parser,
    }
    command = argv[0] if argv and argv[0] in starting else "run"
    parser = starting.get(command, build_parser)()
    own, script = _split_at_script(parser, list(argv if command == "run" else argv[1:]))
    arguments = parser.parse_intermixed_args(own)
    arguments.script = script
    return command, arguments


def _split_at_script(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[list[str], list[str]]:
    """(our words, the script's file and its own words). After -m MODULE every word is the module's."""
    takes_value = {
        flag for action in parser._actions if action.nargs != 0 for flag in action.option_strings
    }
    position = 0
    while position < len(argv):
        word = argv[position]
        if word.startswith("-m") and len(word) > 2:
            return [*argv[:position], "-m", word[2:]], argv[position + 1 :]
        if word in ("-m", "--"):
            # "--" ends the flags, as everywhere; what follows is a script.
            end = position + (2 if word == "-m" else 0)
            return argv[:end], argv[position + 2 :] if word == "-m" else argv[position + 1 :]
        if word.startswith("-"):
            position += 2 if word in takes_value else 1
        elif word.endswith(".py") and "=" not in word:
            return argv[:position], argv[position:]
        else:
            position += 1
    return argv, []


def _function_of(command: str) -> Callable[[argparse.Namespace, dict[str, Any]], int]:
    if command == "merge":
        # By itself: it is to need little memory.
        from ftlaunch.launcher.merge_command import merge

        return merge
    if command in ("status", "logs", "cancel"):
        # By themselves: they look at files and ask SLURM, and need no configuration.
        from ftlaunch.launcher import job_commands

        return {
            "status": job_commands.status,
            "logs": job_commands.logs,
            "cancel": job_commands.cancel,
        }[command]
    if command == "submit":
        from ftlaunch.launcher.submit_command import submit_job

        return submit_job
    if command == "bench":
        from ftlaunch.launcher.bench_command import bench

        return bench
    if command == "plan":
        # By itself: it is asked again and again, and needs nothing that runs a job.
        from ftlaunch.launcher.plan_command import plan

        return plan
    if command == "doctor":
        from ftlaunch.launcher.doctor import doctor

        return doctor
    from ftlaunch.launcher.commands import evaluate, rehearse, train

    return {"run": train, "eval": evaluate, "rehearse": rehearse}[command]


def run(argv: Sequence[str]) -> int:
    """The exit code of the command."""
    command, arguments = parse(argv)
    if getattr(arguments, "version", False):
        from importlib.metadata import version

        print(f"ftlaunch {version('ftlaunch')}")
        return 0

    return exit_code_of(lambda: _function_of(command)(arguments, settings_of(arguments)))


def exit_code_of(action: Callable[[], int]) -> int:
    """What `action` returns, or the code of the error that it raises, whose words go to stderr."""
    from ftlaunch.cluster.errors import (
        EXIT_FAILED,
        EXIT_INTERRUPTED,
        EXIT_USER_MISTAKE,
        FtlaunchError,
        UserError,
    )

    try:
        return action()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return EXIT_USER_MISTAKE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return EXIT_USER_MISTAKE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except FtlaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
