"""Signatures and near-duplicates, against exact Jaccard similarities of the same shingles."""

import re

import numpy as np
import pytest

from qlora.data.similarity import SIGNATURE_SIZE, has_earlier_near_duplicate, signature

WORDS = (
    "a red leaf and the green cloud over blue river by white stone house where very old trees stand".split()
)


def random_texts(number: int, words: int = 60) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, size=words)) for _ in range(number)]


def with_words_changed(text: str, count: int) -> str:
    words = text.split()
    for position in np.random.default_rng(1).choice(len(words), size=count, replace=False):
        words[position] = f"other{position}"
    return " ".join(words)


def jaccard(one: str, other: str) -> float:
    """|A and B| / |A or B| of the sets of three consecutive words."""
    sets = []
    for text in (one, other):
        words = re.findall(r"\w+", text.lower())
        sets.append({tuple(words[start : start + 3]) for start in range(len(words) - 2)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("changed_words", [0, 1, 3, 8, 20])
def test_the_share_of_equal_minima_estimates_the_jaccard_similarity(changed_words):
    """The mean over 40 pairs of texts; one estimate of 32 minima alone is off by about 0.1."""
    errors = []
    for text in random_texts(40):
        other = with_words_changed(text, changed_words)
        estimate = (signature({"text": text}) == signature({"text": other})).mean()
        errors.append(estimate - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.05 and np.abs(errors).max() < 0.35


def test_case_punctuation_and_the_columns_of_the_text_do_not_count():
    want = signature({"text": "A red leaf, and the green cloud."})
    assert want.shape == (SIGNATURE_SIZE,) and want.dtype == np.uint32
    assert (signature({"text": "a RED leaf and the green; cloud"}) == want).all()
    assert (signature({"prompt": "A red leaf", "completion": "and the green cloud", "id": 3}) == want).all()
    messages = [{"content": "A red leaf and"}, {"content": ["the", "green cloud"]}]
    assert (signature({"messages": messages}) == want).all()


@pytest.mark.parametrize("row", [{}, {"text": ""}, {"id": 3}, {"text": "leaf"}, {"text": "red leaf"}])
def test_a_row_with_hardly_any_text_has_a_signature(row):
    assert signature(row).shape == (SIGNATURE_SIZE,)


def test_chinese_characters_count_as_words():
    text = "春眠不覺曉處處聞啼鳥夜來風雨聲花落知多少"
    near, far = text.replace("鳥", "雞"), text[::-1]
    want = signature({"text": text})
    assert (signature({"text": near}) == want).mean() > 0.5 > 0.2 > (signature({"text": far}) == want).mean()


def test_a_long_row_has_the_signature_of_its_parts_together():
    """A row is hashed 10,000 shingles at a time."""
    words = [f"word{number}" for number in range(25_000)]
    whole = signature({"text": " ".join(words)})
    # Parts that overlap by two words have the shingles of the whole.
    parts = [signature({"text": " ".join(words[start : start + 5_002])}) for start in range(0, 25_000, 5_000)]
    assert (whole == np.min(parts, axis=0)).all()


def test_near_duplicates_are_those_of_a_comparison_of_all_pairs():
    """Texts with one word changed in 60 are near, texts with 20 changed and unrelated ones are not."""
    originals = random_texts(30)
    texts = [*originals, *(with_words_changed(text, 1) for text in originals[:10])]
    texts += [with_words_changed(text, 20) for text in originals[10:20]]
    signatures = np.stack([signature({"text": text}) for text in texts])
    expected = [
        any((signatures[row] == signatures[earlier]).mean() >= 0.8 for earlier in range(row))
        for row in range(len(texts))
    ]
    assert has_earlier_near_duplicate(signatures).tolist() == expected
    assert sum(expected[30:40]) >= 8 and not any(expected[:30]) and not any(expected[40:])


def test_only_reference_rows_count_as_earlier_rows():
    one, other = (signature({"text": text}) for text in random_texts(2))
    signatures = np.stack([one, other, other, one])
    assert has_earlier_near_duplicate(signatures).tolist() == [False, False, True, True]
    assert has_earlier_near_duplicate(signatures, 1).tolist() == [False, False, False, True]
