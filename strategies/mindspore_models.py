"""Which of mindone's models compute what torch's do, by task. Names only: no framework is imported."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.options import ModelOptions

# Whose logits and gradients are torch's, to 1e-5 (mindone 0.5 beside transformers 5.23, on a CPU).
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "text-classification": (
        "albert",
        "bert",
        "camembert",
        "distilbert",
        "electra",
        "falcon",
        "gemma",
        "layoutlm",
        "llama",
        "megatron-bert",
        "phi",
        "qwen2",
        "rembert",
        "roberta",
        "stablelm",
        "xlm-roberta",
    ),
    "token-classification": (
        "albert",
        "bert",
        "camembert",
        "distilbert",
        "electra",
        "falcon",
        "megatron-bert",
        "phi",
        "rembert",
        "roberta",
        "stablelm",
        "xlm-roberta",
    ),
    "causal-lm": ("falcon", "gemma", "llama", "phi", "qwen2"),
    "masked-lm": (
        "albert",
        "bert",
        "camembert",
        "distilbert",
        "rembert",
        "roberta",
        "xlm-roberta",
    ),
}
_NO_HEAD = "which mindone's automatic classes do not have for {task}"
_PADDING = "whose embeddings look at the neighbours of a token, at padding too: numbers depend on the length"
_BOTH_WAYS = "which reads in both directions: it would see the tokens that it is to predict"
# Why not, where it is known.
_REASONS: Mapping[tuple[str, str], str] = {
    ("token-classification", "gemma"): _NO_HEAD,
    ("token-classification", "llama"): _NO_HEAD,
    ("token-classification", "layoutlm"): (
        "whose pooler has no gradient for token-classification: with MindSpore it would decay, with torch "
        "it does not"
    ),
    ("token-classification", "qwen2"): (
        "whose head in mindone keeps with the probability with which it should drop"
    ),
    ("text-classification", "mobilebert"): _PADDING,
    ("token-classification", "mobilebert"): _PADDING,
    ("masked-lm", "mobilebert"): _PADDING,
    ("causal-lm", "stablelm"): "which gives logits of the last token only in mindone",
    ("masked-lm", "electra"): _NO_HEAD,
    ("masked-lm", "layoutlm"): _NO_HEAD,
    ("masked-lm", "megatron-bert"): _NO_HEAD,
    ("causal-lm", "mobilebert"): _BOTH_WAYS,
    **{
        ("causal-lm", family): _BOTH_WAYS
        for family in FAMILIES["text-classification"]
        if family not in ("falcon", "gemma", "llama", "phi", "qwen2", "stablelm")
    },
}


def check_family(head: str, family: str, options: ModelOptions) -> None:
    """UserError for a family that mindone lacks with that head, or computes otherwise for all that is
    known.

    head   a `tasks.Head`, or a task
    """
    task = "text-classification" if head == "sequence-classification" else head
    carried = FAMILIES[task]
    if family in carried:
        return
    unknown = (
        "which mindone does not have for {task}, or whose numbers were never compared with torch's: "
        "others of its models turned out to compute something else"
    )
    what = _REASONS.get((task, family), unknown).format(task=task)
    near = difflib.get_close_matches(family, carried, n=3, cutoff=0.4)
    nearest = f" Nearest to it: {', '.join(near)}." if near else ""
    raise UserError(
        f"{options.name_or_path} is a {family!r} model, {what}.{nearest} What can be trained for {task} "
        f"with MindSpore: {', '.join(carried)}. Choose one of these, or train it with --strategy ddp "
        "on CUDA or a CPU."
    )
