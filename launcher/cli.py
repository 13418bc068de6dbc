"""The command line: which command, which flags. It imports nothing but argparse until it knows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

_COMMANDS = ("eval",)
_EPILOG = """\
Everything else is KEY=VALUE, for example train.learning_rate=2e-5 train.num_train_epochs=3
(all keys: docs/configuration.md), or stands in a YAML file given by --config.

  ftlaunch --nodes 4                              the embedded demo: no model, no data, no network
  ftlaunch --nodes 2 --model DIR --dataset DIR -o out train.num_train_epochs=3
  ftlaunch ... -o out                             the same command again resumes
  ftlaunch eval out --dataset DIR                 evaluates alone, writes predictions.jsonl

Exit codes: 0 done, 1 the job failed, 2 a mistake in what was asked for, 75 stopped on request
with a checkpoint (run the same command to go on), 130 ended at once by a second Ctrl-C.
"""


class _Parser(argparse.ArgumentParser):
    """argparse, but an unknown flag is answered with what was probably meant."""

    def error(self, message: str) -> NoReturn:
        unknown = [word for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized arguments") and unknown:
            message += "".join(self._meant(word.partition("=")[0]) for word in unknown)
        # A list of what is required, without what may be left out.
        super().error(message.replace(", KEY=VALUE", ""))

    def _meant(self, flag: str) -> str:
        import difflib

        from ftlaunch.launcher.config import all_keys

        name = flag.removeprefix("--").replace("-", "_")
        by_last = {key.rpartition(".")[2]: key for key in all_keys()}
        keys = [
            f"{by_last[near]}=VALUE" for near in difflib.get_close_matches(name, by_last, 1, 0.8)
        ]
        flags = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.7)
        meant = " or ".join(flags + keys)
        return f"\n{flag} is not a flag. Did you mean {meant}?" if meant else ""


def build_parser() -> argparse.ArgumentParser:
    """The main command's flags. At most 20, frozen by a test."""
    parser = _Parser(
        prog="ftlaunch",
        usage="ftlaunch [flags] [KEY=VALUE ...]\n       ftlaunch eval OUT_OR_MODEL [flags] [KEY=VALUE ...]",
        description="Fine-tune a pretrained model on every device there is.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_shared_flags(parser)
    parser.add_argument(
        "--max-restarts", type=int, metavar="N", help="restarts after a killed rank"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what a job left in OUT")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start nothing")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    return parser


def build_eval_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ftlaunch eval",
        usage="ftlaunch eval OUT_OR_MODEL [flags] [KEY=VALUE ...]",
        description="Evaluate a model on every device there is; writes predictions.jsonl.",
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="OUT_OR_MODEL", help="a job's output folder, or a model")
    _add_shared_flags(parser, model=False)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start nothing")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    return parser


def _add_shared_flags(parser: argparse.ArgumentParser, *, model: bool = True) -> None:
    add = parser.add_argument
    add("--nodes", type=int, metavar="N", help="nodes (without a cluster: processes here)")
    add("--devices", type=int, metavar="N", help="ranks on each node (default: every accelerator)")
    add("--cluster", choices=("local", "ssh", "slurm", "auto"), help="where the nodes are")
    add("--hostfile", metavar="FILE", help="hosts to use over ssh")
    add("--strategy", metavar="NAME", help="ddp (default: chosen by the plan)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), help="of the computation")
    add("--task", metavar="NAME", help="text-classification")
    if model:
        add("--model", metavar="DIR_OR_HUB", help="the pretrained model")
    add("--dataset", metavar="DIR_FILE_OR_HUB", help="the data")
    add("--config", metavar="FILE", help="YAML with any of the keys")
    add("-o", "--output-dir", metavar="OUT", help="where everything goes, and resumes from")


# Flags that say what to do rather than what the run is.
_NOT_SETTINGS = ("config", "dry_run", "overwrite", "overrides", "version", "target")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, by their names as keys."""
    return {
        name: value
        for name, value in vars(arguments).items()
        if name not in _NOT_SETTINGS and value is not None
    }


def parse(argv: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """(command, its arguments). argparse itself ends with exit code 2 for a flag it does not know."""
    if argv and argv[0] in _COMMANDS:
        return argv[0], build_eval_parser().parse_intermixed_args(list(argv[1:]))
    return "run", build_parser().parse_intermixed_args(list(argv))


def run(argv: Sequence[str]) -> int:
    """The exit code of the command."""
    command, arguments = parse(argv)
    if getattr(arguments, "version", False):
        from importlib.metadata import version

        print(f"ftlaunch {version('ftlaunch')}")
        return 0

    from ftlaunch.cluster.errors import (
        EXIT_FAILED,
        EXIT_INTERRUPTED,
        EXIT_USER_MISTAKE,
        FtlaunchError,
        UserError,
    )
    from ftlaunch.launcher.commands import evaluate, train

    try:
        return (train if command == "run" else evaluate)(arguments, settings_of(arguments))
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
