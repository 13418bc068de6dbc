"""The embedded demo job: short reviews from a grammar, and a tiny BERT without weights.

Needs no network and knows nothing of training: the job itself draws the weights from config.json.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ftlaunch.cluster.errors import UserError

# 300 optimizer steps. In a plain torch loop six seeds got 0.95 to 0.99 right; counting words gets 0.75.
DEMO_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "model.random_weights": True,
        "data.max_length": 64,
        "train.num_train_epochs": 3.0,
        "train.global_batch_size": 32,
        "train.learning_rate": 1e-3,
        "train.lr_scheduler_type": "linear",
        "train.warmup_steps": 0.1,
    }
)

_NUM_TRAIN = 3200
_NUM_TEST = 500
_MIN_WORDS, _MAX_WORDS = 5, 40
_NEGATED_SHARE = 0.2

_CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "pad_token_id": 0,
}
# So few that the adjectives are whole but their endings are tokens of their own: this is what makes
# "awfulness" readable to a model that has seen "awful" and "kindness".
_VOCABULARY_SIZE = 660
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_TOKENIZER_CONFIG = {
    # The fast one in transformers 5; version 4 appends "Fast" to it by itself.
    "tokenizer_class": "BertTokenizer",
    "do_lower_case": True,
    "model_max_length": _CONFIG["max_position_embeddings"],
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_FILES = (
    "model/config.json",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "data/train.jsonl",
    "data/test.jsonl",
)


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split())


# All of them form "-ly" and "-ness" without a change of spelling.
_ADJECTIVES = {
    "positive": _list(
        "delightful wonderful graceful cheerful helpful thoughtful tasteful brilliant pleasant "
        "elegant excellent superb splendid solid fresh crisp vivid warm"
    ),
    "negative": _list(
        "dreadful painful careless useless hopeless tasteless awful wretched bland dismal harsh "
        "rude crude stale tedious hideous annoying disappointing"
    ),
}
# Base form and past tense; the third person adds "s".
_VERBS = {
    "positive": {
        "love": "loved",
        "admire": "admired",
        "enjoy": "enjoyed",
        "recommend": "recommended",
        "treasure": "treasured",
        "appreciate": "appreciated",
    },
    "negative": {
        "regret": "regretted",
        "despise": "despised",
        "dislike": "disliked",
        "resent": "resented",
        "detest": "detested",
        "loathe": "loathed",
    },
}
_SUBJECTS = {
    "train": _list(
        "battery screen keyboard handle fabric menu coffee bread staff room garden music film "
        "book recipe camera lens cable charger jacket zip pillow blanket kettle oven bicycle "
        "saddle tent lamp table chair window tour guide lesson course ticket hotel train "
        "crossing"
    ),
    "test": _list("plot soundtrack soup waiter balcony backpack mattress speaker helmet museum"),
}
_MONTHS = _list(
    "January February March April May June July August September October November December"
)
_NEUTRAL = (
    "{person} bought it in {place} last {month}",
    "we ordered the {product} from {place}",
    "it came with a second {subject}",
    "{person} carries it from {place} to {place}",
    "the parcel reached {place} in {month}",
    "I read about the {product} in {month}",
    "{person} asked for the {subject} and got it the next day",
    "there are {number} of them on the shelf",
    "my {product} is {number} months old",
    "this is about the {subject}",
)
_NAME_STARTS = _list(
    "bar cor del fen gal hol jas kel lor mar nor pel quin ras sol tav ul ver wil zan"
)
_NAME_MIDDLES = _list("a e i o u ane ire ola umi")
_NAME_ENDS = {
    "product": _list("vex tron lux dor pix mat"),
    "place": _list("ton ville burg mouth stad field"),
    "person": _list("la ric na bert s th"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """What the reviews of one split may speak of."""

    names: Mapping[str, Sequence[str]]
    adverbs: Mapping[str, Sequence[str]]
    nouns: Mapping[str, Sequence[str]]
    # Third person.
    verbs: Mapping[str, Sequence[str]]


def write_demo(folder: Path, *, seed: int = 0) -> None:
    """Write `folder`/model and `folder`/data, all or nothing; a complete folder is left as it is.

    UserError when `folder` holds something else.
    """
    if _is_complete(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as draft:
        content = Path(draft) / "content"
        _write_files(content, seed)
        try:
            content.rename(folder)
        except OSError as error:
            # Another process may have been faster.
            if _is_complete(folder):
                return
            raise UserError(
                f"The demo cannot be written to {folder}: {error.strerror}. The folder must be "
                "new, empty or a complete demo. Remove it, or choose another folder."
            ) from error


def make_reviews(seed: int) -> dict[str, list[dict[str, str]]]:
    """The splits "train" and "test": rows of text and label, half of them positive.

    No text of "test" occurs in "train", nor does any name or subject of it, nor do a quarter of its
    inflected words of sentiment.
    """
    rng = random.Random(seed)
    words = _divide_words(rng)
    seen: set[str] = set()
    splits: dict[str, list[dict[str, str]]] = {}
    for split, num_rows in (("train", _NUM_TRAIN), ("test", _NUM_TEST)):
        rows: list[dict[str, str]] = []
        while len(rows) < num_rows:
            label = ("negative", "positive")[len(rows) % 2]
            text = _write_review(rng, words[split], label)
            if _MIN_WORDS <= len(text.split()) <= _MAX_WORDS and text not in seen:
                seen.add(text)
                rows.append({"text": text, "label": label})
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def demo_model_config() -> dict[str, Any]:
    """config.json of the demo's model, which need not have been made yet."""
    return {**_CONFIG, "vocab_size": _VOCABULARY_SIZE}


def _write_files(folder: Path, seed: int) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / "data").mkdir()
    reviews = make_reviews(seed)
    for split, rows in reviews.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"data/{split}.jsonl").write_text(lines)
    size = _write_tokenizer(folder / "model", [row["text"] for row in reviews["train"]])
    _write_json(folder / "model/config.json", {**_CONFIG, "vocab_size": size})


def _write_tokenizer(folder: Path, texts: Iterable[str]) -> int:
    """The number of tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import WordPieceTrainer

    def make(vocabulary: dict[str, int]) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    draft = make({})
    # The trainer numbers inner letters in the order of a hash map and breaks ties by number. Given
    # first, they have the same numbers in every process.
    letters = sorted(set(re.findall(r"\w", " ".join(texts).lower())))
    first = [*_SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    trainer = WordPieceTrainer(
        vocab_size=_VOCABULARY_SIZE, special_tokens=first, show_progress=False
    )
    draft.train_from_iterator(texts, trainer)

    # A new one, to which the letters are no special tokens.
    vocabulary = draft.get_vocab()
    tokenizer = make(vocabulary)
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)
    return len(vocabulary)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _divide_words(rng: random.Random) -> dict[str, _Words]:
    names = {kind: _make_names(rng, ends) for kind, ends in _NAME_ENDS.items()}

    def forms(
        split: str, ending: str, held_out: int, words: Mapping[str, Iterable[str]]
    ) -> dict[str, list[str]]:
        """Every fourth one belongs to the test split alone, which knows the others too."""
        return {
            polarity: [
                word + ending
                for index, word in enumerate(roots)
                if split == "test" or index % 4 != held_out
            ]
            for polarity, roots in words.items()
        }

    return {
        split: _Words(
            names={
                **{k: n[:60] if split == "train" else n[60:] for k, n in names.items()},
                "subject": _SUBJECTS[split],
            },
            adverbs=forms(split, "ly", 0, _ADJECTIVES),
            nouns=forms(split, "ness", 2, _ADJECTIVES),
            verbs=forms(split, "s", 1, _VERBS),
        )
        for split in ("train", "test")
    }


def _make_names(rng: random.Random, ends: Sequence[str]) -> list[str]:
    names = [
        (start + middle + end).capitalize()
        for start in _NAME_STARTS
        for middle in _NAME_MIDDLES
        for end in ends
    ]
    return rng.sample(names, 90)


def _write_review(rng: random.Random, words: _Words, label: str) -> str:
    negated = rng.random() < _NEGATED_SHARE
    clauses = [
        _sentiment_clause(rng, words, label, negated) for _ in range(rng.choice((1, 1, 1, 2, 2)))
    ]
    clauses += rng.sample(_NEUTRAL, rng.choice((0, 0, 0, 1, 1, 2, 3)))
    rng.shuffle(clauses)
    text = ""
    for clause in clauses:
        text += (rng.choice((". ", ", and ", "; ")) if text else "") + clause

    def fill(match: re.Match[str]) -> str:
        kind = match[1]
        if kind == "number":
            return str(rng.randint(2, 30))
        return rng.choice(_MONTHS if kind == "month" else words.names[kind])

    text = re.sub(r"\{(\w+)\}", fill, text)
    return re.sub(r"(^|\. )(\w)", lambda match: match[1] + match[2].upper(), text) + "."


def _sentiment_clause(rng: random.Random, words: _Words, label: str, negated: bool) -> str:
    """A clause that means `label`; a negation in it turns a word of the other polarity round."""
    polarity = {"positive": "negative", "negative": "positive"}[label] if negated else label
    kinds: tuple[Callable[[random.Random, _Words, str, bool], str], ...] = (
        _adjective_clause,
        _adjective_clause,
        _adverb_clause,
        _noun_clause,
        _verb_clause,
    )
    return rng.choice(kinds)(rng, words, polarity, negated)


def _adjective_clause(rng: random.Random, words: _Words, polarity: str, negated: bool) -> str:
    adjective = rng.choice(("", "", "very ", "really ", "so ")) + rng.choice(_ADJECTIVES[polarity])
    negation = rng.choice(("not ", "not ", "never "))
    what = (negation if negated else "") + adjective
    frame = rng.choice(
        (
            "the {{subject}} is {}",
            "the {{subject}} was {}",
            "the {{product}} is {}",
            "I found it {}",
        )
    )
    return frame.format(what)


def _adverb_clause(rng: random.Random, words: _Words, polarity: str, negated: bool) -> str:
    adverb = rng.choice(words.adverbs[polarity])
    what = (
        rng.choice(("does not work {}", "did not perform {}", "never behaves {}"))
        if negated
        else rng.choice(("works {}", "performed {}", "behaves {}"))
    )
    return rng.choice(("the {subject} ", "the {product} ", "it ")) + what.format(adverb)


def _noun_clause(rng: random.Random, words: _Words, polarity: str, negated: bool) -> str:
    noun = rng.choice(words.nouns[polarity])
    what = (
        rng.choice(("there is not any {}", "I never saw {}", "it is not full of {}"))
        if negated
        else rng.choice(("there is {}", "I saw {}", "it is full of {}"))
    )
    return what.format(noun) + rng.choice((" in the {subject}", " in it", ""))


def _verb_clause(rng: random.Random, words: _Words, polarity: str, negated: bool) -> str:
    base, past = rng.choice(list(_VERBS[polarity].items()))
    what = rng.choice(
        (f"I did not {base}", f"we never {past}", f"{{person}} would not {base}")
        if negated
        else (f"I {base}", f"we {past}", f"{{person}} {rng.choice(words.verbs[polarity])}")
    )
    return what + rng.choice((" the {subject}", " the {product}", " it"))
