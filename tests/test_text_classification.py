"""Columns, labels, tokens and formulas of text classification."""

import math
from typing import Any

import numpy as np
import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.sources import Splits
from ftlaunch.strategies.data.task_names import TASKS
from ftlaunch.strategies.data.tasks import TaskSpec, load_task
from ftlaunch.strategies.data.text_classification import TextClassification
from ftlaunch.strategies.options import DataOptions

TASK = TextClassification()


def make_rows(columns: Any, features: Any = None) -> Any:
    import datasets

    return datasets.Dataset.from_dict(columns, features=features)


def inspect(train: Any, evaluation: Any = None, whole: Any = None, **options: Any) -> Any:
    splits = Splits(train=train, eval=evaluation, description="", notes=(), whole_train=whole)
    return TASK.inspect(splits, DataOptions(**options))


def by_label(*labels: Any, **more: Any) -> Any:
    return make_rows({"text": [f"t{i}" for i in range(len(labels))], "label": list(labels)} | more)


def test_the_registry() -> None:
    assert isinstance(load_task("text-classification"), TextClassification)
    with pytest.raises(UserError, match=r"no task 'text-clasification': .*Did you mean"):
        load_task("text-clasification")
    with pytest.raises(UserError, match="known are text-classification"):
        load_task("zzz")
    assert all(load_task(name) for name in TASKS)


def test_a_spec_survives_json() -> None:
    import json

    spec = inspect(by_label("b", "a"))
    assert TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    empty: dict[str, Any] = {}
    for broken in (empty, spec.to_dict() | {"x": 1}):
        with pytest.raises(TypeError):
            TaskSpec.from_dict(broken)
    for broken in ({"label_names": ["a"]}, {"num_outputs": "2"}, {"text_columns": [1]}):
        with pytest.raises(ValueError, match=r"wrong type|names"):
            TaskSpec.from_dict(spec.to_dict() | broken)


@pytest.mark.parametrize(
    ("columns", "texts", "label"),
    [
        (["sentence1", "sentence2", "label", "idx"], ("sentence1", "sentence2"), "label"),
        (["premise", "hypothesis", "labels"], ("premise", "hypothesis"), "labels"),
        (["question", "sentence", "target"], ("question", "sentence"), "target"),
        (["question1", "question2", "class"], ("question1", "question2"), "class"),
        (["question", "context", "category"], ("question", "context"), "category"),
        (["text_a", "text_b", "stars"], ("text_a", "text_b"), "stars"),
        (["query", "passage", "score"], ("query", "passage"), "score"),
        (["title", "content", "label"], ("title", "content"), "label"),
        (["text", "sentiment"], ("text",), "sentiment"),
        (["review", "author", "stars"], ("review",), "stars"),
        (["tweet", "label"], ("tweet",), "label"),
        (["utterance", "label"], ("utterance",), "label"),
        (["text", "score", "label"], ("text",), "label"),
    ],
)
def test_guessed_columns(columns: Any, texts: Any, label: Any) -> None:
    spec = inspect(make_rows({name: ["a", "b"] for name in columns}))
    assert (spec.text_columns, spec.label_column) == (texts, label)
    shown = " + ".join(f"'{name}'" for name in texts)
    assert spec.notes == (
        f"columns: text = {shown}, label = '{label}' "
        "(guessed; set data.text_columns and data.label_column to choose)",
    )


def test_chosen_columns() -> None:
    rows = make_rows({"text": ["a", "b"], "other": ["c", "d"], "label": [0, 1], "mood": [5, 7]})
    spec = inspect(rows, text_columns=("other", "text"), label_column="mood")
    assert (spec.text_columns, spec.label_column) == (("other", "text"), "mood")
    assert spec.label_names == ("5", "7") and spec.notes == ()
    assert inspect(rows, label_column="mood").text_columns == ("text",)


def test_columns_that_are_not_there() -> None:
    rows = make_rows({"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(UserError, match=r"no column 'txt' .*'text', 'label'.*data.text_columns"):
        inspect(rows, text_columns=("txt",))
    with pytest.raises(UserError, match=r"no column 'lbl' .*'text', 'label'.*data.label_column"):
        inspect(rows, label_column="lbl")
    with pytest.raises(UserError, match=r"no column 'label' in the evaluation data.*'text', 'l'"):
        inspect(rows, make_rows({"text": ["a"], "l": [0]}))
    with pytest.raises(UserError, match=r"No label column .*'text', 'mood'.*data.label_column"):
        inspect(make_rows({"text": ["a"], "mood": [0]}))
    with pytest.raises(UserError, match=r"No text column .*found 2"):
        inspect(make_rows({"a": ["x"], "b": ["y"], "label": [0]}))
    with pytest.raises(UserError, match="one or two columns"):
        inspect(rows, text_columns=("text", "label"), label_column="label")


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        ([1, 0, 1], ("0", "1"), [1, 0, 1]),
        ([30, -2, 7], ("-2", "7", "30"), [2, 0, 1]),
        (["spam", "ham", "spam"], ("ham", "spam"), [1, 0, 1]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
    ],
)
def test_labels_of_classes(tokenizer: Any, labels: Any, names: Any, ids: Any) -> None:
    rows = by_label(*labels)
    spec = inspect(rows)
    assert (spec.problem, spec.loss) == ("classification", "cross_entropy")
    assert (spec.label_names, spec.num_outputs) == (names, len(names))
    encoded = TASK.encode(rows[:], tokenizer, spec, 16).labels
    assert encoded.dtype == np.int64 and encoded.tolist() == ids


def test_class_labels_keep_their_names_and_ids(tokenizer: Any) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes", "?"])}
    )
    rows = make_rows({"text": ["a", "b"], "label": [1, 0]}, features)
    later = make_rows({"text": ["a"], "label": [2]}, features)
    spec = inspect(rows, later)
    assert spec.label_names == ("no", "yes", "?") and spec.labels_are_ids
    assert TASK.encode(rows[:], tokenizer, spec, 16).labels.tolist() == [1, 0]
    missing = make_rows({"text": ["a", "b", "c"], "label": [1, -1, -1]}, features)
    with pytest.raises(UserError, match=r"evaluation data holds .*\[-1\], first in row 2.*0 to 2"):
        inspect(rows, missing)
    with pytest.raises(UserError, match=r"named classes no, yes.*whole numbers in the evaluation"):
        inspect(rows, by_label(0, 1))


def test_floats_are_a_regression(tokenizer: Any) -> None:
    rows = by_label(0.5, 2.25)
    spec = inspect(rows)
    assert (spec.problem, spec.loss, spec.num_outputs) == ("regression", "mse", 1)
    assert spec.label_names == () and len(spec.notes) == 1
    labels = TASK.encode(rows[:], tokenizer, spec, 16).labels
    assert labels.dtype == np.float32 and labels.tolist() == [0.5, 2.25]
    spec = inspect(by_label(1.0, 5.0, 3.0))
    assert spec.problem == "regression"
    assert spec.notes[1].startswith("labels: 'label' holds only 1, 3, 5, but as floating-point")


def test_missing_labels_and_texts() -> None:
    with pytest.raises(UserError, match=r"label column 'label' .* in 2 of 4 rows, .* row 2\."):
        inspect(by_label(0, None, 1, None))
    with pytest.raises(UserError, match=r"missing in 2 of 2 rows, the first is row 1"):
        inspect(by_label(None, None))
    rows = make_rows({"text": ["a", "", None], "label": [0, 1, 0]})
    with pytest.raises(
        UserError, match=r"text column 'text' .* in 1 of 3 rows, .* row 3\. An empty"
    ):
        inspect(rows)
    # Of a subset the row in the file is named, not the one in the subset.
    with pytest.raises(UserError, match=r"row 3\."):
        inspect(rows.select([0, 2]))
    with pytest.raises(UserError, match=r"holds nan in row 2"):
        inspect(by_label(1.0, math.nan))
    with pytest.raises(UserError, match=r"holds inf in row 1"):
        inspect(by_label(math.inf, 1.5))


def test_labels_that_training_lacks() -> None:
    train = by_label("a", "b")
    with pytest.raises(UserError, match=r"evaluation data holds .*: 'c', 'd' in 'label'.*'a', 'b'"):
        inspect(train, by_label("c", "a", "d"))
    drawn = inspect(train, by_label("c"), whole=by_label("c", "b", None, "a", "d"))
    assert drawn.label_names == ("a", "b", "c", "d")
    with pytest.raises(UserError, match="str values in the training data but whole numbers in"):
        inspect(train, by_label(0, 1))


def test_one_class_is_not_enough() -> None:
    with pytest.raises(UserError, match=r"All labels in 'label' are 'a': .*at least two"):
        inspect(by_label("a", "a"), by_label("a"))


def test_columns_of_the_wrong_type() -> None:
    lists = make_rows({"text": [["a"], ["b"]], "label": [0, 1]})
    with pytest.raises(
        UserError, match=r"'text' of the training data is not text: .*(list|sequence)"
    ):
        inspect(lists)
    with pytest.raises(UserError, match=r"is int64, and it must be string"):
        inspect(make_rows({"text": [1, 2], "label": [0, 1]}))
    with pytest.raises(UserError, match=r"label column 'label' .* type dict"):
        inspect(make_rows({"text": ["a", "b"], "label": [{"x": 0}, {"x": 1}]}))


def test_text_that_is_not_utf8() -> None:
    import datasets
    import pyarrow

    bad = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(np.array([0, 1, 2], np.int32)), pyarrow.py_buffer(b"a\xe9")
    )
    rows = datasets.Dataset(pyarrow.table({"text": bad, "label": ["x", "y"]}))
    with pytest.raises(UserError, match=r"'text' of the training data is not UTF-8 in row 2"):
        inspect(rows)
    with pytest.raises(UserError, match=r"'text' of the training data is not UTF-8 in row 2"):
        inspect(rows.rename_columns({"text": "t"}).rename_columns({"t": "text"}))
    swapped = rows.rename_columns({"text": "label", "label": "text"})
    with pytest.raises(UserError, match=r"'label' of the training data is not UTF-8 in row 2"):
        inspect(swapped)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


PAIR = TaskSpec(
    task="text-classification",
    text_columns=("text_a", "text_b"),
    label_column="label",
    problem="classification",
    label_names=("x", "y"),
    num_outputs=2,
    loss="cross_entropy",
)


def test_pairs_are_cut_at_the_longer_text(tokenizer: Any) -> None:
    rows = {"text_a": ["a b c d", "a"], "text_b": ["d", ""], "label": ["y", "x"]}
    encoded = TASK.encode(rows, tokenizer, PAIR, 6)
    # 4 + 1 words and 3 special tokens are 8: two words of the longer text go.
    assert encoded.input_ids == [[2, 4, 5, 3, 7, 3], [2, 4, 3, 3]]
    assert encoded.token_type_ids == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1]]
    assert encoded.labels.tolist() == [1, 0]
    assert encoded.num_truncated == 1


def test_text_without_any_token_becomes_padding() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<e>": 0, "<u>": 1, "a": 2}, unk_token="<u>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<e>", model_input_names=["input_ids", "attention_mask"]
    )
    spec = inspect(make_rows({"text": ["", "a a a"], "label": [0, 1]}))
    encoded = TASK.encode({"text": ["", "a a a"], "label": [0, 1]}, bare, spec, 2)
    assert encoded.input_ids == [[0], [2, 2]] and encoded.token_type_ids is None
    assert encoded.num_truncated == 1


def test_cross_entropy_by_hand() -> None:
    # softmax(0, ln 3) = (1/4, 3/4): losses ln 4 for label 0 and ln(4/3) for label 1.
    logits = np.array([[0, math.log(3)], [0, math.log(3)], [np.nan, 0]], dtype=np.float32)
    loss, weight = TASK.evaluation_loss(
        logits, np.array([0, 1, 0]), np.array([2.0, 1.0, 0.0], np.float32), PAIR
    )
    assert loss == pytest.approx(2 * math.log(4) + math.log(4 / 3), rel=1e-6)
    assert weight == 3.0 and type(loss) is float
    big, _ = TASK.evaluation_loss(np.array([[1e4, 0.0]]), np.array([1]), np.ones(1), PAIR)
    assert big == 1e4


def test_squared_error_by_hand() -> None:
    spec = inspect(by_label(0.5, 2.25))
    loss, weight = TASK.evaluation_loss(
        np.array([[1.0], [3.0]]), np.array([0.0, 1.0], np.float32), np.array([1.0, 0.5]), spec
    )
    assert (loss, weight) == (1.0 + 4.0 * 0.5, 1.5)


def test_predictions() -> None:
    import json

    found = TASK.predictions(np.array([[0, math.log(3)], [1000.0, 0]], np.float32), PAIR)
    assert [f["label"] for f in found] == ["y", "x"] and [f["label_id"] for f in found] == [1, 0]
    assert found[0]["scores"] == pytest.approx({"x": 0.25, "y": 0.75})
    assert found[1]["scores"] == {"x": 1.0, "y": 0.0}
    regression = inspect(by_label(0.5, 2.25))
    values = TASK.predictions(np.array([[1.5]], np.float32), regression)
    assert json.loads(json.dumps([found, values]))[1] == [{"value": 1.5}]


def test_default_metrics() -> None:
    assert TASK.default_metrics(PAIR) == ("accuracy", "f1")
    regression = inspect(by_label(0.5, 2.25))
    assert TASK.default_metrics(regression) == ("pearson", "spearman", "mse")
