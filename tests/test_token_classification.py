"""Tags of words: columns, spans, which token carries a tag, what is refused, and the scores.

Token ids are those of `word_pieces`; tags of texts with spans are O 0, B-LOC 1, I-LOC 2, B-PER 3, …
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.entity_scores import are_entities, entity_scores
from ftlaunch.strategies.data.sources import Splits
from ftlaunch.strategies.data.task_names import check_own_keys
from ftlaunch.strategies.data.tasks import ModelLabels, TaskSpec
from ftlaunch.strategies.data.token_classification import TokenClassification
from ftlaunch.strategies.data.token_outputs import TokenOutputs
from ftlaunch.strategies.data.word_tags import join_words, label_tokens, words_of_spans
from ftlaunch.strategies.options import DataOptions
from ftlaunch.strategies.token_evaluation import choose_metrics
from tests.word_pieces import Data, listed, write_tokenizer

TASK = TokenClassification()
NO = -100
ANNA = {"tokens": ["Annas", "lives", "in", "Yorkshire"], "ner_tags": ["B-PER", "O", "O", "B-LOC"]}


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path, "token-classification")


def test_the_first_token_of_a_word_carries_its_tag(data: Data) -> None:
    tokens = data.prepare([ANNA, {"tokens": ["Bob", "."], "ner_tags": ["B-PER", "O"]}])
    assert tokens.spec.label_names == ("B-LOC", "B-PER", "O")
    assert listed(tokens.train) == [
        ([2, 5, 6, 7, 8, 10, 11, 3], [NO, 1, NO, 2, 2, 0, NO, NO]),
        ([2, 13, 12, 3], [NO, 1, 2, NO]),
    ]
    assert tokens.train.items(np.arange(2)).tolist() == [4, 2]
    assert (tokens.spec.head, tokens.spec.num_outputs) == ("token-classification", 3)
    assert "words = 'tokens', tags = 'ner_tags'" in "\n".join(tokens.notes)
    again = TaskSpec.from_dict(json.loads(json.dumps(tokens.spec.to_dict())))
    assert again == tokens.spec


def test_a_word_of_several_for_the_tokenizer_has_one_tag(data: Data) -> None:
    # "Bob's" is bob ' s, and "New York" given as one word is one.
    row = {"words": ["Bob's", "New York", "."], "tags": ["B-PER", "B-LOC", "O"]}
    tokens = data.prepare([row])
    assert listed(tokens.train) == [
        ([2, 13, 15, 16, 9, 10, 12, 3], [NO, 1, NO, NO, 0, NO, 2, NO]),
    ]


def test_spans_become_bio_tags(data: Data) -> None:
    # 0         1         2
    # 0123456789012345678901234567
    # Annas lives in New Yorkshire.
    text = "Annas lives in New Yorkshire."
    spans = [{"start": 15, "end": 28, "label": "LOC"}, {"start": 0, "end": 5, "label": "PER"}]
    tokens = data.prepare([{"text": text, "spans": spans}, {"text": "Bob lives.", "spans": []}])
    assert tokens.spec.label_names == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert listed(tokens.train) == [
        (
            [2, 5, 6, 7, 8, 9, 10, 11, 12, 3],
            [NO, 3, NO, 0, 0, 1, 2, NO, 0, NO],
        ),
        ([2, 13, 7, 12, 3], [NO, 0, 0, 0, NO]),
    ]
    assert "text = 'text', spans = 'spans'" in "\n".join(tokens.notes)


def test_words_are_cut_at_the_borders_of_spans() -> None:
    ranges, tags = words_of_spans(0, "Bobby's", [{"start": 0, "end": 3, "label": "X"}], (), "spans")
    assert ranges == [(0, 3), (3, 5), (5, 6), (6, 7)]
    assert tags == ["B-X", "O", "O", "O"]
    # Of tokens bob, ##by, ', s each is the first of a word now.
    offsets = [(0, 0), (0, 3), (3, 5), (5, 6), (6, 7), (0, 0)]
    assert label_tokens("Bobby's", offsets, ranges, [1, 0, 0, 0]) == [NO, 1, 0, 0, 0, NO]
    # One token for the whole word has the tag of its beginning.
    assert label_tokens("Bobby's", [(0, 5), (5, 7)], ranges, [1, 0, 2, 3]) == [1, 2]


def test_blanks_before_a_word_belong_to_no_word() -> None:
    text, words = join_words(["a", "", "bc"])
    assert (text, words) == ("a  bc", [(0, 1), (2, 2), (3, 5)])
    # A byte-level tokenizer: "a", " ", " b", "c"; and the bytes of one character one by one.
    assert label_tokens(text, [(0, 1), (1, 2), (2, 4), (4, 5)], words, [7, 8, 9]) == [7, NO, 9, NO]
    assert label_tokens("é", [(0, 1), (0, 1)], [(0, 1)], [4]) == [4, NO]


def test_whole_numbers_and_class_labels_as_tags(data: Data) -> None:
    import datasets

    tokens = data.prepare([{"tokens": ["anna", "in"], "tags": [7, 0]}])
    assert tokens.spec.label_names == ("0", "7")
    assert listed(tokens.train)[0][1] == [NO, 1, 0, NO]
    names = ["O", "B-PER", "I-PER"]
    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("string")),
            "tags": datasets.Sequence(datasets.ClassLabel(names=names)),
        }
    )
    rows = datasets.Dataset.from_dict({"tokens": [["anna", "in"]], "tags": [[1, 0]]}, features)
    spec = inspect(rows)
    assert spec.label_names == tuple(names) and spec.labels_are_ids
    bad = datasets.Dataset.from_dict({"tokens": [["anna", "in"]], "tags": [[1, -1]]}, features)
    with pytest.raises(UserError, match=r"class numbers \[-1\], first in row 1: .* 0 to 2"):
        inspect(bad)


def inspect(train: Any, evaluation: Any = None, **options: Any) -> TaskSpec:
    splits = Splits(train=train, eval=evaluation, description="", notes=(), whole_train=None)
    return TASK.inspect(splits, DataOptions(**options))


# -- samples that are empty or too long ---------------------------------------------------------


LONG = {"tokens": ["anna", "lives", "in", "york"], "tags": ["B-PER", "O", "O", "B-LOC"]}


def test_empty_samples_are_left_out_and_told(data: Data) -> None:
    tokens = data.prepare([LONG, {"tokens": [], "tags": []}, {"tokens": [""], "tags": ["O"]}])
    assert len(tokens.train) == 1
    assert "train: 2 of 3 samples have no token to be learned" in "\n".join(tokens.notes)
    with pytest.raises(UserError, match=r"None of the 1 samples of the eval data"):
        data.prepare([LONG], [{"tokens": [""], "tags": ["O"]}])


def test_samples_that_are_too_long(data: Data) -> None:
    short = {"tokens": ["bob"], "tags": ["B-PER"]}
    cut = data.prepare([LONG, short], [short], max_length=5)
    assert listed(cut.train)[0] == ([2, 5, 7, 8, 3], [NO, 1, 2, 2, NO])
    assert "train: 1 of 2 samples were cut to 5 tokens" in "\n".join(cut.notes)
    dropped = data.prepare([LONG, short], [short], max_length=5, long_samples="drop")
    assert listed(dropped.train) == [([2, 13, 3], [NO, 1, NO])]
    assert dropped.train.origins(np.arange(1)).tolist() == [1]
    assert "1 of 2 samples are longer than data.max_length" in "\n".join(dropped.notes)
    with pytest.raises(UserError, match=r"Row 1 of the training data has 6 tokens: .* is 5"):
        data.prepare([LONG, short], [short], max_length=5, long_samples="error")
    with pytest.raises(UserError, match="means nothing to the task text-classification"):
        check_own_keys("text-classification", DataOptions(long_samples="drop"))


# -- what is refused ----------------------------------------------------------------------------

WORDS_BUT_FEW_TAGS = {"tokens": ["anna", "in"], "tags": ["O"]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([LONG, {"tokens": ["a"], "tags": ["O", "O"]}], r"Row 2 .* 1 words in 'tokens' and 2 tags"),
        ([LONG, WORDS_BUT_FEW_TAGS], r"Row 2 .* 2 words in 'tokens' and 1 tags"),
        ([{"tokens": ["a", "in"], "tags": ["O", "O"]}], "All tags in 'tags' are 'O'"),
        ([{"tokens": [1, 2], "tags": ["O", "X"]}], "does not hold lists of words: .*int64"),
        ([{"tokens": "a b", "tags": ["O", "X"]}], "does not hold lists of words"),
        ([{"tokens": ["a"], "tags": [0.5]}], "each label must be a string or a whole number"),
        ([{"tokens": ["a", "b"], "tags": ["O", 1]}], "each label must be a string or a whole"),
        ([LONG, {"tokens": ["a"], "tags": [None]}], "missing value in row 2"),
        ([LONG, {"tokens": [None], "tags": ["O"]}], "missing value in row 2"),
        ([LONG, {"tokens": None, "tags": ["O"]}], r"missing in 1 of 2 rows, the first is row 2"),
        ([{"text": "a", "label": "x"}], "No column of tags was recognised"),
        ([{"x": ["a"], "tags": ["x"]}], "No column of lists of words was recognised"),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:20],
)
def test_words_and_tags_that_do_not_fit(data: Data, rows: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        data.prepare(rows)


def span(start: Any, end: Any, label: Any = "X") -> dict[str, Any]:
    return {"start": start, "end": end, "label": label}


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([span(0, 9)], r"Row 2 .* from 0 to 9, and its text has 7 characters"),
        ([span(-1, 3)], r"from -1 to 3, and its text has 7 characters"),
        ([span(3, 3)], r"from 3 to 3"),
        ([span(4, 7), span(0, 5, "Y")], r"overlap, 0 to 5 \(Y\) and 4 to 7 \(X\)"),
        ([span(3, 4)], "holds only blanks, 3 to 4"),
        ([span(0, None)], "without start or end"),
        ([span(0, 3, None)], "missing value in row 2"),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:20],
)
def test_spans_that_do_not_fit(data: Data, spans: Any, said: str) -> None:
    good = {"text": "anna in york", "entities": [span(0, 4), span(8, 12, "Y")]}
    with pytest.raises(UserError, match=said):
        data.prepare([good, {"text": "bob in.", "entities": spans}], [good])


def test_spans_with_other_keys(data: Data) -> None:
    with pytest.raises(UserError, match=r"have the keys 'from', 'label', 'to': each needs start"):
        data.prepare([{"text": "anna", "spans": [{"from": 0, "to": 4, "label": "X"}]}])


def test_tags_that_training_lacks(data: Data) -> None:
    with pytest.raises(UserError, match=r"evaluation data holds labels .*: 'B-ORG' in 'tags'"):
        data.prepare([LONG], [{"tokens": ["york"], "tags": ["B-ORG"]}])
    good = {"text": "anna", "spans": [span(0, 4)]}
    with pytest.raises(UserError, match=r"evaluation data holds labels .*: 'Z' in 'spans'"):
        data.prepare([good], [{"text": "anna", "spans": [span(0, 4, "Z")]}])


def test_the_columns_that_are_named_are_taken(data: Data) -> None:
    row = {**LONG, "pos": ["N", "V", "P", "N"]}
    tokens = data.prepare([row], label_column="pos", text_columns=("tokens",))
    assert tokens.spec.label_names == ("N", "P", "V")
    assert listed(tokens.train)[0][1] == [NO, 0, 2, 1, 0, NO]
    with pytest.raises(UserError, match="no column 'no' in the training data"):
        data.prepare([row], label_column="no")
    with pytest.raises(UserError, match="does not hold lists"):
        data.prepare([{**row, "text": "a"}], label_column="text")
    with pytest.raises(UserError, match="takes one column"):
        data.prepare([row], text_columns=("tokens", "pos"))


def test_a_tokenizer_that_knows_no_places() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match=r"Slow, which does not tell where"):
        TASK.fit_tokenizer(SPEC, Slow(), DataOptions())


# -- a trained model's own tags -----------------------------------------------------------------


def test_rows_are_evaluated_with_the_models_tags(data: Data) -> None:
    names = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    model = ModelLabels(problem="classification", label_names=names)
    tokens = data.prepare([LONG], labels=model)
    assert tokens.spec.label_names == names
    assert listed(tokens.train)[0][1] == [NO, 3, 0, 0, 1, NO]
    spans = data.prepare([{"text": "in york", "spans": [span(3, 7, "LOC")]}], labels=model)
    assert listed(spans.train)[0][1] == [NO, 0, 1, NO]
    with pytest.raises(
        UserError, match=r"not the model's: the data has 'O', 'B-X', 'I-X', the mod"
    ):
        data.prepare([{"text": "in york", "spans": [span(3, 7)]}], labels=model)
    unnamed = ModelLabels(problem="classification", label_names=("LABEL_0", "LABEL_1", "LABEL_2"))
    tokens = data.prepare([{"tokens": ["anna", "in"], "tags": [2, 0]}], labels=unnamed)
    assert listed(tokens.train)[0][1] == [NO, 2, 0, NO]


# -- scores -------------------------------------------------------------------------------------

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
SPEC = TaskSpec(
    task="token-classification",
    text_columns=("tokens",),
    label_column="tags",
    problem="tokens",
    label_names=NAMES,
    num_outputs=5,
    loss="token_cross_entropy",
    head="token-classification",
    keeps_winners=True,
    details={"input": "words", "span_labels": [], "long_samples": "truncate"},
)


def test_scores_by_hand() -> None:
    # Expected: PER 0-1, LOC 3; LOC 0. Predicted: PER 0-1, LOC 3-4; none. One of two is right,
    # one of three is found: P 1/2, R 1/3, F1 = 2 * 1/2 * 1/3 / (5/6) = 2/5.
    expected = [["B-PER", "I-PER", "O", "B-LOC", "O"], ["B-LOC"]]
    predicted = [["B-PER", "I-PER", "O", "B-LOC", "I-LOC"], ["O"]]
    scores = entity_scores(predicted, expected)
    assert scores == pytest.approx({"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5})
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    # The same in BILOU: L ends and U is alone.
    bilou = [["B-PER", "L-PER", "O", "U-LOC", "O"], ["U-LOC"]]
    wrong = [["B-PER", "L-PER", "O", "B-LOC", "L-LOC"], ["O"]]
    assert entity_scores(wrong, bilou) == pytest.approx(scores)


def test_metrics_and_records_of_what_a_model_found() -> None:
    labels = [np.array([NO, 1, NO, 2, 0, NO]), np.array([NO, 3, NO])]
    winners = [np.array([0, 1, 4, 2, 3, 0]), np.array([0, 3, 0])]
    # Entities expected: PER 0-1, LOC 0; predicted: PER 0-1, LOC 2 and LOC 0: P 2/3, R 1, F1 4/5.
    outputs = TokenOutputs(
        loss_sums=np.array([1.0, 2.0]),
        weight_sums=np.array([3.0, 1.0]),
        num_items=np.array([3, 1]),
        num_correct=np.array([2, 1]),
        origins=np.array([0, 4]),
        winners=winners,
        labels=labels,
    )
    assert TASK.default_metrics(SPEC) == ("precision", "recall", "f1", "accuracy")
    found: dict[str, float] = {}
    for metric in choose_metrics(TASK, SPEC, None).values():
        found |= metric(outputs, SPEC)
    assert found == pytest.approx(
        {"precision": 2 / 3, "recall": 1.0, "f1": 4 / 5, "accuracy": 3 / 4}
    )
    assert all(type(value) is float for value in found.values())
    assert TASK.predictions(outputs, SPEC) == [
        {"index": 0, "tags": ["B-PER", "I-PER", "B-LOC"], "expected": ["B-PER", "I-PER", "O"]},
        {"index": 4, "tags": ["B-LOC"], "expected": ["B-LOC"]},
    ]


def test_tags_that_are_no_entities_have_accuracy_alone() -> None:
    from dataclasses import replace

    assert are_entities(NAMES) and not are_entities(("O",)) and not are_entities(("NN", "VB"))
    parts_of_speech = replace(SPEC, label_names=("NN", "VB"), num_outputs=2)
    assert TASK.default_metrics(parts_of_speech) == ("accuracy",)
    with pytest.raises(
        UserError, match="'f1' does not fit the task token-classification: it has acc"
    ):
        choose_metrics(TASK, parts_of_speech, ("f1",))


def test_the_cache_is_found_again(data: Data, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "pieces")
    first = data.prepare([LONG], tokenizer=tokenizer, cache_dir=str(tmp_path / "cache"))
    again = data.prepare([LONG], tokenizer=tokenizer, cache_dir=str(tmp_path / "cache"))
    assert again.hit and again.key == first.key and listed(again.train) == listed(first.train)
