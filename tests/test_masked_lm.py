"""Hidden tokens: which may be hidden, how often which is, and that it depends on nothing else.

Token ids are those of `word_pieces`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from ftlaunch.cluster.errors import UserError
from ftlaunch.strategies.data.batches import EVALUATION_EPOCH
from ftlaunch.strategies.data.masked_lm import MaskedLm
from ftlaunch.strategies.data.masks import MaskRule, mask_tokens
from ftlaunch.strategies.data.task_names import check_own_keys
from ftlaunch.strategies.data.token_batches import TokenCollator, sample_generator
from ftlaunch.strategies.options import DataOptions
from tests.word_pieces import MASK, PIECES, Data, listed, write_tokenizer

NO = -100
MANY = 200_000
VOCABULARY = 1000


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path, "masked-lm")


def rule(probability: float = 0.15, *, whole_words: bool = False) -> MaskRule:
    return MaskRule(
        probability=probability,
        whole_words=whole_words,
        mask_token_id=MASK,
        vocabulary=VOCABULARY,
    )


def generator(number: int = 0) -> np.random.Generator:
    return sample_generator(7, 0, number)


# -- the rule -----------------------------------------------------------------------------------


def test_15_of_100_are_guessed_80_10_10_of_them_hidden_replaced_kept() -> None:
    ids = np.full(MANY, 500, dtype=np.int32)
    seen, wanted = mask_tokens(ids, np.arange(MANY, dtype=np.int32), rule(), generator())
    chosen = wanted != NO
    # Four standard deviations of a share p of n: 4 sqrt(p (1 - p) / n).
    assert abs(chosen.mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / MANY)
    assert (wanted[chosen] == 500).all() and (seen[~chosen] == 500).all()
    count = chosen.sum()
    hidden, kept = seen[chosen] == MASK, seen[chosen] == 500
    others = seen[chosen][~hidden & ~kept]
    # One replacement in 1000 is the mask, or the token itself: too few to be seen here.
    for share, expected in ((hidden.mean(), 0.8), (kept.mean(), 0.1), (len(others) / count, 0.1)):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count) + 0.0002
    # Uniform over the vocabulary: the mean of 0 to 999 is 499.5, the deviation of one 289.
    assert others.min() >= 0 and others.max() < VOCABULARY
    assert abs(others.mean() - 499.5) < 4 * 289 / np.sqrt(len(others))
    assert ids.tolist() == [500] * MANY


def test_some_tokens_are_never_hidden() -> None:
    words = np.array([NO, 0, 1, NO] * 500, dtype=np.int32)
    ids = np.array([2, 10, 11, 3] * 500, dtype=np.int32)
    seen, wanted = mask_tokens(ids, words, rule(0.9), generator())
    assert (seen[words == NO] == ids[words == NO]).all()
    assert (wanted[words == NO] == NO).all()
    assert (wanted[words != NO] != NO).mean() > 0.85


def test_the_tokens_of_a_word_are_guessed_together() -> None:
    # Words of 1, 2, 3, 1, 2, 3, … tokens.
    words = np.repeat(np.arange(30_000, dtype=np.int32), np.tile([1, 2, 3], 10_000))
    ids = np.full(len(words), 500, dtype=np.int32)
    seen, wanted = mask_tokens(ids, words, rule(whole_words=True), generator())
    chosen = wanted != NO
    share = np.bincount(words, weights=chosen) / np.bincount(words)
    assert set(share.tolist()) == {0.0, 1.0}
    assert abs(share.mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 30_000)
    # What is done with each token is drawn by itself.
    assert abs((seen[chosen] == MASK).mean() - 0.8) < 4 * np.sqrt(0.8 * 0.2 / chosen.sum())
    alone = mask_tokens(ids, words, rule(), generator())[1]
    mixed = np.bincount(words, weights=alone != NO) / np.bincount(words)
    assert ((mixed > 0) & (mixed < 1)).any()


def test_draws_are_the_same_in_every_release() -> None:
    """Another draw would break the resuming of jobs; these were drawn once and are kept."""
    ids = np.arange(100, 130, dtype=np.int32)
    seen, wanted = mask_tokens(ids, np.arange(30, dtype=np.int32), rule(0.3), generator(3))
    # By hand from the first 90 numbers of Philox for (7, 0, 3).
    numbers = generator(3).bit_generator.random_raw(90) >> np.uint64(11)
    uniform = numbers.astype(np.float64) * 2.0**-53
    chance, treatment, replacement = uniform[:30], uniform[30:60], uniform[60:]
    for place in range(30):
        if chance[place] >= 0.3:
            expected = (100 + place, NO)
        elif treatment[place] < 0.8:
            expected = (MASK, 100 + place)
        elif treatment[place] < 0.9:
            expected = (int(replacement[place] * VOCABULARY), 100 + place)
        else:
            expected = (100 + place, 100 + place)
        assert (seen[place], wanted[place]) == expected
    assert generator(3).bit_generator.random_raw(2).tolist() == KEPT


# The first numbers of Philox with the key blake2b("7/0/3").
KEPT = [10712975949619568177, 9885809682532874077]


# -- rows ---------------------------------------------------------------------------------------


def test_words_are_numbered_and_special_tokens_are_not(data: Data) -> None:
    tokens = data.prepare([{"text": "Annas lives [SEP] in Yorkshire xyz."}, {"text": ""}])
    # [CLS] anna ##s lives [SEP] in york ##shire [UNK] . [SEP]
    [(ids, words)] = listed(tokens.train)
    assert ids == [2, 5, 6, 7, 3, 8, 10, 11, 1, 12, 3]
    first, second, third, last = words[1], words[3], words[5], words[6]
    assert words == [NO, first, first, second, NO, third, last, last, NO, words[9], NO]
    assert len({first, second, third, last, words[9]}) == 5
    assert "train: 1 of 2 samples have no token to be learned" in "\n".join(tokens.notes)
    assert tokens.spec.head == "masked-lm" and tokens.spec.drawn
    assert tokens.spec.details["mask_token_id"] == MASK
    # Any token may be drawn at random, so the model has to know them all.
    assert tokens.max_token_id == len(PIECES) - 1


def test_lines_of_plain_text(data: Data, tmp_path: Path) -> None:
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.txt").write_text("anna lives\n\nin york\n")
    (tmp_path / "lines" / "validation.txt").write_text("bob\n")
    tokens = data.prepare([{"text": "unused"}], name_or_path=str(tmp_path / "lines"))
    assert [ids for ids, _ in listed(tokens.train)] == [[2, 5, 7, 3], [2, 8, 10, 3]]
    assert [ids for ids, _ in listed(tokens.eval)] == [[2, 13, 3]]


def test_samples_that_are_too_long(data: Data) -> None:
    rows = [{"text": "anna lives in york"}, {"text": "bob"}]
    cut = data.prepare(rows, max_length=4)
    assert listed(cut.train)[0][0] == [2, 5, 7, 3]
    assert "train: 1 of 2 samples were cut to 4 tokens" in "\n".join(cut.notes)
    dropped = data.prepare(rows, rows[1:], max_length=4, long_samples="drop")
    assert [ids for ids, _ in listed(dropped.train)] == [[2, 13, 3]]
    with pytest.raises(UserError, match="Row 1 of the training data has 6 tokens"):
        data.prepare(rows, max_length=4, long_samples="error")


def test_what_is_refused(data: Data, tmp_path: Path) -> None:
    without = write_tokenizer(tmp_path / "without", mask_token=None)
    with pytest.raises(UserError, match="has no mask token: masked-lm hides tokens behind it"):
        data.prepare([{"text": "anna"}], tokenizer=without)
    with pytest.raises(UserError, match="No column of texts was recognised"):
        data.prepare([{"n": 1}])
    with pytest.raises(UserError, match="means nothing to the task causal-lm: it is for masked-lm"):
        check_own_keys("causal-lm", DataOptions(mlm_probability=0.3))
    check_own_keys("masked-lm", DataOptions(mlm_probability=0.3, whole_word_masking=True))


@pytest.mark.parametrize(
    ("option", "value"), [("mlm_probability", 0.3), ("whole_word_masking", True)]
)
def test_a_cache_is_of_its_options(data: Data, tmp_path: Path, option: str, value: Any) -> None:
    options: Any = {"cache_dir": str(tmp_path / "cache")}
    options["tokenizer"] = write_tokenizer(tmp_path / "tokenizer")
    first = data.prepare([{"text": "anna"}], **options)
    assert data.prepare([{"text": "anna"}], **options).hit
    other = data.prepare([{"text": "anna"}], **{**options, option: value})
    assert not other.hit and other.key != first.key


# -- draws --------------------------------------------------------------------------------------


def collator(tokens: Any, seed: int = 7) -> TokenCollator:
    return TokenCollator(
        table=tokens.train,
        task=cast(Any, MaskedLm()),
        spec=tokens.spec,
        pad_token_id=0,
        seed=seed,
    )


def drawn(batches: TokenCollator, indices: list[int], epoch: int) -> list[tuple[Any, Any]]:
    found = batches.samples(np.array(indices), epoch)
    return [(each.input_ids.tolist(), each.labels.tolist()) for each in found]


def test_masks_follow_from_seed_epoch_and_sample_alone(data: Data) -> None:
    rows = [{"text": "anna lives in new york " * (5 + i)} for i in range(6)]
    tokens = data.prepare(rows, mlm_probability=0.4)
    batches = collator(tokens)
    alone = [drawn(batches, [i], 2)[0] for i in range(6)]
    assert drawn(collator(tokens), [5, 0, 3], 2) == [alone[5], alone[0], alone[3]]
    assert drawn(batches, [0], 3)[0] != alone[0]
    assert drawn(collator(tokens, seed=8), [0], 2)[0] != alone[0]
    assert drawn(batches, [0], EVALUATION_EPOCH) == drawn(batches, [0], EVALUATION_EPOCH)
    # The window's divisor counts what was drawn, whoever computes it.
    chosen = sum(label != NO for _, labels in alone for label in labels)
    assert batches.total_items(np.arange(6), epoch=2) == chosen
    batch = batches.batch(np.array([1, 4]), seed=0, epoch=2)
    assert batch.labels[0, : len(alone[1][1])].tolist() == alone[1][1]
    assert batch.inputs["input_ids"][1, : len(alone[4][0])].tolist() == alone[4][0]
    assert batch.weights.sum() == sum(label != NO for i in (1, 4) for label in alone[i][1])
