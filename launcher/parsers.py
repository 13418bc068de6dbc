"""The parsers of every command: which flags it has. What they do is the configuration's to say."""

from __future__ import annotations

import argparse
from typing import NoReturn

_EPILOG = """\
Everything else is KEY=VALUE, for example train.learning_rate=2e-5 train.num_train_epochs=3
(all keys: docs/configuration.md), or stands in a YAML file given by --config.

  ftlaunch --nodes 4                              the embedded demo: no model, no data, no network
  ftlaunch --nodes 2 --model DIR --dataset DIR -o out train.num_train_epochs=3
  ftlaunch ... -o out                             the same command again resumes
  ftlaunch plan --nodes 2 --hardware H100-80GB --model config.json      what a job would need
  ftlaunch eval out --dataset DIR                 evaluates alone, writes predictions.jsonl
  ftlaunch --nodes 2 script.py --its-own args     your own script on every rank
  ftlaunch merge out merged/                      a checkpoint as a model, also DeepSpeed's, MindSpore's
  ftlaunch merge --adapter out/model BASE merged/ a LoRA adapter into its base's weights
  ftlaunch submit --nodes 4 --partition gpu --time 4:00:00 -o out ...        as a job of SLURM
  ftlaunch status out | logs out --follow | cancel out                   of any job, this or that
  ftlaunch doctor --hostfile hosts -o out         what is on every node, whether a job would run
  ftlaunch bench --nodes 1,2,4 ...                how fast it trains, where the time goes, how it scales
  ftlaunch rehearse --nodes 4 --fault kill-rank:3@step5       any of these, with faults on purpose

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
        usage="ftlaunch [flags] [KEY=VALUE ...]\n"
        "       ftlaunch [flags] [KEY=VALUE ...] SCRIPT.py [its own arguments]\n"
        "       ftlaunch eval OUT_OR_MODEL [flags] [KEY=VALUE ...]\n"
        "       ftlaunch plan [flags] [KEY=VALUE ...] [--hardware NAME] [--json]\n"
        "       ftlaunch merge [--verify] SOURCE TARGET [flags]\n"
        "       ftlaunch rehearse --fault FAULT [flags] [KEY=VALUE ...] [SCRIPT.py ...]\n"
        "       ftlaunch submit [flags] [KEY=VALUE ...] [SCRIPT.py ...]\n"
        "       ftlaunch status|logs|cancel OUT [flags]\n"
        "       ftlaunch doctor [flags] [KEY=VALUE ...]\n"
        "       ftlaunch bench [--nodes 1,2,4] [flags] [KEY=VALUE ...]",
        description="Fine-tune a pretrained model on every device there is.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_shared_flags(parser)
    _add_flags_of_runs(parser)
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    return parser


def build_submit_parser() -> argparse.ArgumentParser:
    """The main command's flags without those that say where, and SLURM's. At most 20 as well."""
    parser = _Parser(
        prog="ftlaunch submit",
        usage="ftlaunch submit [flags] [KEY=VALUE ...] [SCRIPT.py ... | -m MODULE ...]",
        description="Put a job into SLURM's queue; it runs what is here now, whatever is edited later.",
        epilog="Other options of sbatch are keys: slurm.constraint=a100 slurm.exclude=n7 "
        "slurm.cpus_per_task=8 slurm.exclusive=true. All of it: docs/clusters.md.",
        allow_abbrev=False,
    )
    _add_shared_flags(parser, where=False)
    _add_flags_of_runs(parser)
    add = parser.add_argument
    add("--partition", dest="slurm.partition", metavar="NAME", help="of SLURM, as the next five")
    add("--time", dest="slurm.time", metavar="TIME", help="the limit: H:MM:SS, D-HH, or minutes")
    add("--account", dest="slurm.account", metavar="NAME")
    add("--qos", dest="slurm.qos", metavar="NAME")
    add("--gpus-per-node", dest="slurm.gpus_per_node", metavar="N")
    add("--mem", dest="slurm.mem", metavar="SIZE", help="of each node: 64G")
    add("overrides", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    return parser


def build_status_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ftlaunch status",
        usage="ftlaunch status OUT [--json]",
        description="Where a job is: waiting, running, or how it ended.",
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="OUT", help="the job's output folder")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def build_logs_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ftlaunch logs",
        usage="ftlaunch logs OUT [--follow] [--rank N]",
        description="What a job and its ranks have printed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("target", metavar="OUT", help="the job's output folder")
    add("--follow", action="store_true", help="go on until the job has ended")
    add("--rank", type=int, metavar="N", help="that of one rank only")
    return parser


def build_cancel_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ftlaunch cancel",
        usage="ftlaunch cancel OUT",
        description="End a job; one that trains saves a checkpoint first.",
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="OUT", help="the job's output folder")
    return parser


def build_rehearse_parser() -> argparse.ArgumentParser:
    """The main command's flags, and the faults."""
    parser = build_parser()
    parser.prog = "ftlaunch rehearse"
    parser.usage = "ftlaunch rehearse --fault FAULT [flags] [KEY=VALUE ...] [SCRIPT.py ...]"
    parser.description = "Run a job on this machine with faults on purpose; prints a timeline."
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:N@MOMENT",
        help="such as kill-rank:3@step5, hang-node:2@20s, kill-agent:0@save; may be repeated",
    )
    return parser


def build_plan_parser() -> argparse.ArgumentParser:
    """The main command's flags without --version, and two of its own."""
    parser = _Parser(
        prog="ftlaunch plan",
        usage="ftlaunch plan [flags] [KEY=VALUE ...] [--hardware NAME] [--json]",
        description="Say how a job would run and what memory it would need; starts nothing.",
        epilog="--model may be a folder with config.json alone, or such a file; data is not needed. What "
        "the numbers are made of: docs/planning.md.",
        allow_abbrev=False,
    )
    _add_shared_flags(parser)
    _add_flags_of_runs(parser)
    add = parser.add_argument
    add("--hardware", metavar="NAME", help="plan for such nodes, here or not: H100-80GB, …")
    add("--json", action="store_true", help="print the plan as one JSON object instead")
    add("overrides", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
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


def build_merge_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ftlaunch merge",
        usage="ftlaunch merge SOURCE TARGET [--dtype fp32|bf16|fp16] [--model DIR_OR_HUB]\n"
        "       ftlaunch merge --adapter ADAPTER BASE TARGET [--dtype ...] [--model ...]\n"
        "       ftlaunch merge --verify [--adapter ADAPTER] SOURCE TARGET",
        description="Make a model folder of a checkpoint, in a few megabytes of memory.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="a checkpoint, ours, DeepSpeed's or MindSpore's, or a job's output folder; with --adapter "
        "the model that it belongs to",
    )
    add("target", metavar="TARGET", help="the folder to make; with --verify the one to compare")
    add("--adapter", metavar="ADAPTER", help="put this LoRA adapter into SOURCE, its base")
    add(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of the weights (default: fp32; with --adapter the base's)",
    )
    add("--model", metavar="DIR_OR_HUB", help="where config.json and the tokenizer come from")
    add("--verify", action="store_true", help="compare every byte, change nothing; 1: they differ")
    return parser


def build_doctor_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ftlaunch doctor",
        usage="ftlaunch doctor [flags] [KEY=VALUE ...]",
        description="Say what is on every node, whether they fit together, and how fast they talk.",
        epilog="Exit codes: 0 a job would run, 1 it would fail, 2 a mistake in what was asked for.",
        allow_abbrev=False,
    )
    _add_shared_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    return parser


def build_bench_parser() -> argparse.ArgumentParser:
    """Flags that say where and what, of which three take several values, and its own."""
    parser = _Parser(
        prog="ftlaunch bench",
        usage="ftlaunch bench [--nodes 1,2,4] [flags] [KEY=VALUE ...]",
        description="Measure how fast a job trains, where its time goes, and how it scales.",
        epilog="Without --dataset the samples are random (bench.lengths, bench.samples), without --model it "
        "is the demo. Exit codes: 0 all was measured, 1 a cell failed, 2 a mistake in what was asked "
        "for, 130 stopped; what was measured until then is kept. All of it: docs/benchmarks.md.",
        allow_abbrev=False,
    )
    _add_shared_flags(parser, several=True)
    add = parser.add_argument
    add("--steps", dest="bench.steps", metavar="N", help="that are measured (default: 20)")
    add("--warmup-steps", dest="bench.warmup_steps", metavar="N", help="before them (default: 5)")
    add(
        "--repeats",
        dest="bench.repeats",
        metavar="N",
        help="of each cell, in turn (3; 5 with --compare)",
    )
    add("--compare", metavar="PEER,PEER", help="beside these: hf, accelerate, torchrun, deepspeed")
    add("--dry-run", action="store_true", help="print the cells, start nothing")
    add("--json", action="store_true", help="print bench.json instead of lines")
    add("overrides", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    return parser


def _add_flags_of_runs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-restarts", type=int, metavar="N", help="restarts after a killed rank")
    add("--overwrite", action="store_true", help="delete what a job left in OUT")
    add("--dry-run", action="store_true", help="print the plan, start nothing")
    add("-m", dest="module", metavar="MODULE", help="your own module, then its args")


def _add_shared_flags(
    parser: argparse.ArgumentParser,
    *,
    model: bool = True,
    where: bool = True,
    several: bool = False,
) -> None:
    """`several`: nodes, strategies and precisions are lists."""
    add = parser.add_argument
    if several:
        add(
            "--nodes",
            metavar="N,N",
            help="numbers of nodes to compare (default: one, or all hosts)",
        )
    else:
        add("--nodes", type=int, metavar="N", help="nodes (without a cluster: processes here)")
    add("--devices", type=int, metavar="N", help="ranks on each node (default: every accelerator)")
    if where:
        add("--cluster", choices=("local", "ssh", "slurm", "auto"), help="where the nodes are")
        add("--hostfile", metavar="FILE", help="hosts to use over ssh")
    if several:
        add("--strategy", metavar="NAME,NAME", help="each of them: ddp,zero2 (default: what fits)")
        add("--precision", metavar="NAME,NAME", help="each of them: fp32,bf16 (default: auto)")
    else:
        add("--strategy", metavar="NAME", help="ddp, zero1, zero2 or zero3 (default: what fits)")
        add("--precision", choices=("auto", "fp32", "bf16", "fp16"), help="of the computation")
    add("--task", metavar="NAME", help="what is learned: text-classification, causal-lm, …")
    if model:
        add("--model", metavar="DIR_OR_HUB", help="the pretrained model")
    add("--dataset", metavar="DIR_FILE_OR_HUB", help="the data")
    add("--config", metavar="FILE", help="YAML with any of the keys")
    add("-o", "--output-dir", metavar="OUT", help="where everything goes, and resumes from")
