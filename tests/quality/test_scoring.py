"""Scores of answers: by words, by options, by ROUGE-L."""

from __future__ import annotations

from itertools import combinations

import pytest
from hybridkv_quality.sample import Sample
from hybridkv_quality.scoring import (
    chosen_option,
    contains,
    right_option,
    rouge_l,
    score,
    word_hits,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st

TEXTS = st.lists(st.sampled_from(["red", "blue", "green", "one"]), max_size=7).map(" ".join)


def sample(metric: str, answer: str, choices: tuple[str, ...] = ()) -> Sample:
    return Sample("t", "n", (), answer, "c", metric, choices=choices)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("red blue", 1.0),
        (" red  blue \n", 1.0),
        ("red, blue.", 1.0),
        ("red blue green", 0.0),
        ("blue red", 0.0),
        ("red", 0.0),
        ("", 0.0),
        # Names in the suite differ by case alone.
        ("Red blue", 0.0),
    ],
)
def test_words_must_be_the_answers_and_nothing_else(output: str, right: float) -> None:
    assert score(output, sample("words", "red blue")) == right


def test_each_word_is_compared_at_its_place() -> None:
    assert word_hits("red green blue", "red blue blue") == [True, False, True]
    assert word_hits("red", "red blue") == [True, False]
    assert word_hits("red blue green", "red blue") == [True, True]
    assert word_hits("", "red") == [False]


@pytest.mark.parametrize(
    ("output", "found"),
    [("It is Red Blue.", True), ("red or blue", False), ("redblue", False), ("", False)],
)
def test_an_answer_is_found_as_whole_words(output: str, found: bool) -> None:
    assert contains(output, "red blue") is found


@pytest.mark.parametrize(
    ("output", "chosen"),
    [
        ("B", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B. dark red", 1),
        ("**C**", 2),
        ("The answer is C.", 2),
        ("Answer: B", 1),
        ("A careful look says the answer is B", 1),
        ("the answer is a dark red one", 1),
        ("dark red", 1),
        ("It is red.", 0),
        ("red or green", None),
        ("D", None),
        ("A green thing", 2),
        ("no idea", None),
        ("", None),
    ],
)
def test_an_option_is_read_from_its_letter_or_its_text(output: str, chosen: int | None) -> None:
    assert chosen_option(output, ("red", "dark red", "green")) == chosen


def test_more_options_than_letters_are_told_apart_by_text() -> None:
    options = tuple(f"item{n}" for n in range(40))
    assert chosen_option("item33", options) == 33
    assert chosen_option("B", options) is None


def test_letters_alone_as_options_are_not_looked_for_in_words() -> None:
    assert chosen_option("I see a dog", ("A", "B", "C", "D")) is None
    assert chosen_option("D", ("A", "B", "C", "D")) == 3


def test_the_right_option_is_a_text_or_a_letter() -> None:
    assert right_option(sample("choice", "green", ("red", "green"))) == 1
    assert right_option(sample("choice", "B", ("red", "green"))) == 1
    # An option's text goes before the letter that it looks like.
    assert right_option(sample("choice", "B", ("B", "A"))) == 0
    with pytest.raises(ValueError, match="none of its choices"):
        right_option(sample("choice", "E", ("red", "green")))


def test_choice_and_rouge_are_scored_by_their_metric() -> None:
    assert score("B", sample("choice", "green", ("red", "green"))) == 1.0
    assert score("A", sample("choice", "green", ("red", "green"))) == 0.0
    assert score("no idea", sample("choice", "red", ("red", "green"))) == 0.0
    assert score("it says red", sample("contains", "red")) == 1.0
    # Common: "the cat sat": 2 * 3 / (3 + 6).
    assert score("the cat sat", sample("rouge", "the cat sat on the mat")) == pytest.approx(2 / 3)


@given(TEXTS, TEXTS)
@settings(max_examples=60, deadline=None)
def test_rouge_is_the_longest_common_subsequence_against_both_lengths(output: str, answer: str) -> None:
    def subsequences(text: list[str]) -> set[tuple[str, ...]]:
        return {chosen for length in range(len(text) + 1) for chosen in combinations(text, length)}

    given_words, wanted = words(output), words(answer)
    longest = max(map(len, subsequences(given_words) & subsequences(wanted)))
    expected = 2 * longest / (len(given_words) + len(wanted)) if given_words and wanted else 0.0
    assert rouge_l(output, answer) == pytest.approx(expected)
    assert rouge_l(output, answer) == pytest.approx(rouge_l(answer, output))
