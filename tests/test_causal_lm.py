"""What language models are trained on: columns, tokens, which of them are learned, packing.

Token ids are counted by hand: the tokenizer knows whole words, in the order of `WORDS`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.packing import Blocks, pack
from ftlaunch.strategies.data.task_names import check_own_keys
from ftlaunch.strategies.data.tasks import TaskSpec
from ftlaunch.strategies.data.token_batches import TokenCollator
from ftlaunch.strategies.data.token_cache import prepare_tokens
from ftlaunch.strategies.data.token_outputs import TokenOutputs, perplexity, token_accuracy
from ftlaunch.strategies.data.tokenizer import TokenizerSource
from ftlaunch.strategies.options import DataOptions
from tests.jobs import write_rows
from tests.token_cases import CASES, causal_rows, causal_spec

# 0 [PAD], 1 [UNK], 2 [BOS], 3 [EOS], 4 <user>, 5 <assistant>, 6 <system>, 7 <end>, then a to j
WORDS = (
    *("[PAD]", "[UNK]", "[BOS]", "[EOS]", "<user>", "<assistant>", "<system>", "<end>"),
    *"abcdefghij",
)
A, B, C, D = 8, 9, 10, 11
EOS, USER, SAID, SYSTEM, END = 3, 4, 5, 6, 7
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %} {% else %}{{ m.content }} {% endif %}<end> {% endfor %}"
)


def write_tokenizer(folder: Path, **settings: Any) -> TokenizerSource:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "eos_token": "[EOS]",
        "chat_template": TEMPLATE,
        **settings,
    }
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return TokenizerSource(name_or_path=str(folder))


class Data:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, rows: list[dict[str, Any]], *, tokenizer: Any = None, **options: Any) -> Any:
        folder = self.folder / str(len(list(self.folder.iterdir())))
        (folder / "data").mkdir(parents=True)
        write_rows(folder / "data" / "train.jsonl", rows)
        write_rows(folder / "data" / "test.jsonl", rows[:1])
        wanted = {"name_or_path": str(folder / "data"), "cache_dir": str(folder / "cache")}
        return prepare_tokens(
            "causal-lm",
            DataOptions(**{**wanted, **options}),
            tokenizer or write_tokenizer(folder / "tokenizer"),
            seed=1,
            model_max_length=None,
        )


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def listed(tokens: Any) -> list[tuple[list[int], list[int]]]:
    samples = tokens.train.samples(np.arange(len(tokens.train)))
    return [(s.input_ids.tolist(), s.labels.tolist()) for s in samples]


NO = -100


def test_plain_text_predicts_every_next_token_and_the_end(data: Data) -> None:
    tokens = data.prepare([{"text": "a b c"}, {"text": "d"}])
    assert listed(tokens) == [
        ([2, A, B, C, EOS], [A, B, C, EOS, NO]),
        ([2, D, EOS], [D, EOS, NO]),
    ]
    assert tokens.train.items(np.arange(2)).tolist() == [4, 2]
    assert not tokens.uses_token_type_ids
    assert tokens.spec.head == "causal-lm"
    assert "text = 'text'" in "\n".join(tokens.notes)
    assert not tokens.hit
    again = TaskSpec.from_dict(json.loads(json.dumps(tokens.spec.to_dict())))
    assert again == tokens.spec


def test_of_prompt_and_completion_the_completion_is_learned(data: Data) -> None:
    rows = [{"prompt": "a b", "completion": "c d"}, {"prompt": "", "completion": "a"}]
    tokens = data.prepare(rows)
    assert listed(tokens) == [
        ([2, A, B, C, D, EOS], [NO, NO, C, D, EOS, NO]),
        ([2, A, EOS], [A, EOS, NO]),
    ]
    assert tokens.spec.label_column == "completion"
    named = data.prepare(
        [{"x": "a", "y": "b"}, {"x": "b", "y": "a"}], text_columns=("x",), label_column="y"
    )
    assert listed(named)[0] == ([2, A, B, EOS], [NO, B, EOS, NO])


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_of_a_conversation_the_assistants_turns_are_learned(data: Data) -> None:
    """The turn's end belongs to it, its beginning to what is given."""
    rows = [
        conversation(("system", "a"), ("user", "b"), ("assistant", "c d")),
        conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
    ]
    assert listed(data.prepare(rows)) == [
        (
            [SYSTEM, A, END, USER, B, END, SAID, C, D, END],
            [NO, NO, NO, NO, NO, NO, C, D, END, NO],
        ),
        (
            [USER, A, END, SAID, B, END, USER, C, END, SAID, D, END],
            [NO, NO, NO, B, END, NO, NO, NO, NO, D, END, NO],
        ),
    ]


def test_a_template_may_mark_what_is_generated(data: Data, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "marked", chat_template=MARKED)
    rows = [conversation(("user", "a"), ("assistant", "b c"))] * 2
    assert listed(data.prepare(rows, tokenizer=tokenizer))[0] == (
        [USER, A, END, SAID, B, C, END],
        [NO, NO, NO, B, C, NO, NO],
    )


def test_what_a_template_puts_before_the_first_turn_is_not_learned(
    data: Data, tmp_path: Path
) -> None:
    with_system = "{% if messages[0].role != 'system' %}<system> j <end> {% endif %}" + TEMPLATE
    tokenizer = write_tokenizer(tmp_path / "system", chat_template=with_system)
    rows = [conversation(("assistant", "a"), ("user", "b"), ("assistant", "c"))] * 2
    assert listed(data.prepare(rows, tokenizer=tokenizer))[0] == (
        [SYSTEM, 17, END, SAID, A, END, USER, B, END, SAID, C, END],
        [NO, NO, NO, A, END, NO, NO, NO, NO, C, END, NO],
    )


@pytest.mark.parametrize(
    ("form", "date"),
    [
        ("%d %b %Y", "26 Jul 2024"),
        ("%Y-%m-%d", "2024-07-26"),
        ("%A, %-d %B %y %H:%M", "Friday, 26 July 24 00:00"),
    ],
)
def test_the_date_of_a_template_is_always_the_same(
    data: Data, tmp_path: Path, form: str, date: str
) -> None:
    dated = f"{{{{ 'a' if strftime_now('{form}') == '{date}' else 'b' }}}} " + TEMPLATE
    tokenizer = write_tokenizer(tmp_path / "dated", chat_template=dated)
    rows = [conversation(("user", "c"), ("assistant", "d"))] * 2
    assert listed(data.prepare(rows, tokenizer=tokenizer))[0][0][0] == A


@pytest.mark.parametrize("begin", ["\n", "  {% if true %}x{% endif %}", "  y"])
def test_a_template_is_rendered_as_it_is_everywhere_else(tmp_path: Path, begin: str) -> None:
    from transformers import AutoTokenizer

    from ftlaunch.strategies.data.conversations import _render

    source = write_tokenizer(tmp_path / "t", chat_template=begin + TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(source.name_or_path)
    messages = conversation(("user", "c"), ("assistant", "d"))["messages"]
    assert _render(messages, 0, tokenizer) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )


def test_messages_may_differ_in_their_keys(data: Data) -> None:
    first = conversation(("user", "a"), ("assistant", "b"))
    second = conversation(("user", "a"), ("assistant", "b"))
    second["messages"][0]["name"] = "c"
    second["messages"][1]["tool_calls"] = [{"id": 1, "arguments": {"x": 2}}]
    one, other = listed(data.prepare([first, second]))
    assert one == other == ([USER, A, END, SAID, B, END], [NO, NO, NO, B, END, NO])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("packing", "samples"),
        ("packing", "concatenate"),
        ("long_samples", "drop"),
        ("max_length", 3),
    ],
)
def test_a_cache_is_of_its_options(data: Data, tmp_path: Path, option: str, value: Any) -> None:
    rows = [{"text": "a b c"}, {"text": "d"}]
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    options = {"cache_dir": str(tmp_path / "cache"), "max_length": 8, "tokenizer": tokenizer}
    first = data.prepare(rows, **options)
    # A cache that were found by the rows and the tokenizer alone would be.
    assert data.prepare(rows, **options).hit
    other = data.prepare(rows, **{**options, option: value})
    assert not other.hit and other.key != first.key


# -- bad input ----------------------------------------------------------------------------------


def test_a_message_that_is_no_utf8(data: Data, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [conversation(("user", "a"), ("assistant", text)) for text in "bc"]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "data" / "train.jsonl").write_bytes(lines.replace(b'"c"', b'"\xff"'))
    write_rows(tmp_path / "data" / "test.jsonl", rows)
    with pytest.raises(UserError, match="not UTF-8 in row 2"):
        data.prepare(rows, name_or_path=str(tmp_path / "data"))


def test_a_template_that_is_broken(data: Data, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "broken", chat_template=TEMPLATE + "{{ 1 // 0 }}")
    with pytest.raises(UserError, match=r"Row 1 .* refused .*zero"):
        data.prepare([conversation(("user", "a"), ("assistant", "b"))], tokenizer=tokenizer)


def test_a_chat_template_that_is_missing(data: Data, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "plain", chat_template=None)
    with pytest.raises(UserError, match="no chat template"):
        data.prepare([conversation(("user", "a"), ("assistant", "b"))], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (conversation(("user", "a"), ("robot", "b")), r"Row 2 .* role 'robot' in message 2"),
        (conversation(("user", "a"), ("assistant", None)), r"Row 2 .* no text in message 2"),  # type: ignore[arg-type]
        ({"messages": []}, r"Row 2 .* no messages"),
    ],
    ids=["role", "content", "empty"],
)
def test_a_row_that_is_no_conversation(data: Data, row: dict[str, Any], message: str) -> None:
    good = conversation(("user", "a"), ("assistant", "b"))
    with pytest.raises(UserError, match=message):
        data.prepare([good, row])


def test_a_template_that_refuses_a_conversation(data: Data, tmp_path: Path) -> None:
    refusing = (
        TEMPLATE + "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    )
    tokenizer = write_tokenizer(tmp_path / "refusing", chat_template=refusing)
    turns = [("user", "a"), ("assistant", "b")]
    with pytest.raises(UserError, match=r"Row 1 .* refused .*too many"):
        data.prepare([conversation(*turns, *turns)], tokenizer=tokenizer)


def test_a_template_that_changes_what_was_said_before(data: Data, tmp_path: Path) -> None:
    changing = "{{ messages | length }} " + TEMPLATE
    tokenizer = write_tokenizer(tmp_path / "changing", chat_template=changing)
    turns = [("user", "a"), ("assistant", "b")]
    with pytest.raises(UserError, match=r"Row 1 .*cannot be divided into turns.*generation"):
        data.prepare([conversation(*turns, *turns)], tokenizer=tokenizer)


def test_samples_without_anything_to_learn_are_left_out(data: Data) -> None:
    good = conversation(("user", "a"), ("assistant", "b"))
    tokens = data.prepare([good, conversation(("user", "a"), ("user", "b")), good])
    assert len(tokens.train) == 2
    assert tokens.train.origins(np.arange(2)).tolist() == [0, 2]
    assert "train: 1 of 3 samples have no token to be learned" in "\n".join(tokens.notes)
    with pytest.raises(UserError, match="None of the 2 samples of the train data"):
        data.prepare([conversation(("user", "a"))] * 2)


@pytest.mark.parametrize("policy", ["truncate", "drop", "error"])
def test_samples_that_are_too_long(data: Data, policy: str) -> None:
    rows = [{"text": "a b"}, {"text": "a b c d"}]
    options = {"max_length": 4, "long_samples": policy}
    if policy == "error":
        with pytest.raises(UserError, match=r"Row 2 of the training data has 6 tokens"):
            data.prepare(rows, **options)
        return
    tokens = data.prepare(rows, **options)
    whole = ([2, A, B, EOS], [A, B, EOS, NO])
    if policy == "truncate":
        assert listed(tokens) == [whole, ([2, A, B, C], [A, B, C, NO])]
        assert "train: 1 of 2 samples were cut to 4 tokens" in "\n".join(tokens.notes)
    else:
        assert listed(tokens) == [whole]
        assert "train: 1 of 2 samples are longer than" in "\n".join(tokens.notes)


def test_columns_that_do_not_fit(data: Data) -> None:
    with pytest.raises(UserError, match="No column of texts was recognised"):
        data.prepare([{"x": "a", "y": "b"}] * 2)
    with pytest.raises(UserError, match="no column 'z'"):
        data.prepare([{"x": "a"}] * 2, text_columns=("z",))
    with pytest.raises(UserError, match="needs role and content"):
        data.prepare([{"messages": [{"from": "user", "value": "a"}]}] * 2)
    with pytest.raises(UserError, match="only plain texts can"):
        data.prepare([{"prompt": "a", "completion": "b"}] * 2, packing="concatenate")
    with pytest.raises(UserError, match="never too long"):
        data.prepare([{"text": "a"}] * 2, packing="concatenate", long_samples="drop")
    with pytest.raises(UserError, match=r"data\.packing is set, and means nothing"):
        check_own_keys("text-classification", DataOptions(packing="samples"))


# -- packing ------------------------------------------------------------------------------------


def test_packing_fills_rows_and_loses_nothing() -> None:
    lengths = np.random.default_rng(1).integers(1, 33, 500)
    rows = pack(lengths, 32)
    assert sorted(np.concatenate(rows).tolist()) == list(range(500))
    assert max(lengths[row].sum() for row in rows) <= 32
    # 500 rows of 16.5 on average: 258 are the least possible.
    assert len(rows) <= lengths.sum() / 32 * 1.02 + 1
    assert [row.tolist() for row in pack(np.array([3, 2, 2, 1]), 4)] == [[0, 3], [1, 2]]


def test_samples_side_by_side(data: Data) -> None:
    rows = [{"text": "a b"}, {"text": "c"}, {"text": "d"}]
    tokens = data.prepare(rows, packing="samples", max_length=7)
    # 4 and 3 tokens fill a row, 3 are left.
    assert listed(tokens) == [
        ([2, A, B, EOS, 2, C, EOS], [A, B, EOS, NO, C, EOS, NO]),
        ([2, D, EOS], [D, EOS, NO]),
    ]
    assert tokens.train.items(np.arange(2)).tolist() == [5, 2]
    collator = TokenCollator(
        table=tokens.train,
        task=CASES["causal-lm-qwen2"].collator(causal_rows(1)).task,
        spec=tokens.spec,
        pad_token_id=0,
        seed=1,
    )
    batch = collator.batch(np.arange(2), seed=1)
    assert sorted(batch.inputs) == ["input_ids", "position_ids"]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 1, 2, 3]]
    assert batch.weights.sum() == collator.total_items(np.arange(2)) == 7
    assert (batch.num_tokens, batch.num_padded_tokens) == (10, 14)


def test_texts_joined_and_cut(data: Data) -> None:
    rows = [{"text": "a b"}, {"text": "c"}, {"text": "d"}]
    tokens = data.prepare(rows, packing="concatenate", max_length=4)
    # [BOS] a b [EOS] | [BOS] c [EOS] [BOS] | d [EOS]
    assert listed(tokens) == [
        ([2, A, B, EOS], [A, B, EOS, NO]),
        ([2, C, EOS, 2], [C, EOS, 2, NO]),
        ([D, EOS], [EOS, NO]),
    ]
    table = causal_rows(6)
    whole = np.concatenate(table.ids)
    blocks = Blocks(table, 7)
    found = blocks.samples(np.arange(len(blocks)))
    assert np.concatenate([each.input_ids for each in found]).tolist() == (
        whole[: len(whole) - (len(whole) % 7 == 1)].tolist()
    )


# -- items and metrics --------------------------------------------------------------------------


def test_items_are_counted_after_the_shift() -> None:
    """transformers counts labels before it: one too many where the first token is supervised."""
    case = CASES["causal-lm-qwen2"]
    table = causal_rows(4)
    collator = case.collator(table)
    by_hand = sum(int((labels[:-1] != NO).sum()) for labels in table.labels)
    assert collator.total_items(np.arange(4)) == by_hand
    filler = collator.batch(np.array([], dtype=np.int64), seed=1)
    assert (filler.weights.sum(), filler.num_samples) == (0, 0)


def test_metrics_by_hand() -> None:
    outputs = TokenOutputs(
        loss_sums=np.array([1.0, 5.0]),
        weight_sums=np.array([2.0, 4.0]),
        num_items=np.array([2, 4]),
        num_correct=np.array([1, 2]),
        origins=np.array([0, 1]),
    )
    spec = causal_spec()
    assert perplexity(outputs, spec) == {"perplexity": pytest.approx(np.e)}
    assert token_accuracy(outputs, spec) == {"token_accuracy": 0.5}
