"""How an answer is scored: by its words, by the letter of an option, or by ROUGE-L."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from hybridkv_quality.sample import Sample

# A letter alone, at the start ("B", "(B)", "B. because") or after "answer is".
_LEADING_LETTER = re.compile(r"^[\s(\[*\"']*([A-Z])(?=$|[\s.,:;)\]*\"'])")
# ... unless it is the first word of a sentence.
_FIRST_WORD = re.compile(r"[AI]\s+\w")
_ANNOUNCED_LETTER = re.compile(r"\b(?i:answer)(?:\s+is)?\s*:?[\s(\[*\"']*([A-Z])(?=$|[\s.,:;)\]*\"'])")


def exact_words(text: str) -> list[str]:
    """The text's words without punctuation at their edges; case counts."""
    stripped = (word.strip(string.punctuation) for word in text.split())
    return [word for word in stripped if word]


def words(text: str) -> list[str]:
    """The text's words without punctuation at their edges, and without case."""
    return [word.casefold() for word in exact_words(text)]


def word_hits(output: str, answer: str) -> list[bool]:
    """For each word of the answer whether the output has it at that place."""
    given, wanted = exact_words(output), exact_words(answer)
    given += [""] * (len(wanted) - len(given))
    return [got == word for got, word in zip(given, wanted, strict=False)]


def contains(output: str, answer: str) -> bool:
    """Whether the answer's words stand side by side somewhere in the output, whatever their case."""
    given, wanted = words(output), words(answer)
    return any(given[start : start + len(wanted)] == wanted for start in range(len(given) - len(wanted) + 1))


def has_letters(choices: Sequence[str]) -> bool:
    """Whether there is a letter for each option."""
    return len(choices) <= len(string.ascii_uppercase)


def letter(index: int) -> str:
    """The letter of the option at `index`, for up to 26."""
    return string.ascii_uppercase[index]


def chosen_option(output: str, choices: Sequence[str]) -> int | None:
    """The option that an output names: by its letter, or by being the only one whose text it holds.

    An option's text inside another's does not count ("red" in "dark red"). None where no option, or more than
    one, is named.
    """
    text = output.strip()
    leading = None if _FIRST_WORD.match(text) else _LEADING_LETTER.search(text)
    if has_letters(choices) and (match := leading or _ANNOUNCED_LETTER.search(text)):
        index = string.ascii_uppercase.index(match.group(1))
        if index < len(choices):
            return index
    # Where only the letters are known, a word of one letter is none.
    texts = [choice if choice not in string.ascii_uppercase else "" for choice in choices]
    named = [index for index, choice in enumerate(texts) if choice and contains(output, choice)]
    whole = [
        index
        for index in named
        if not any(other != index and contains(choices[other], choices[index]) for other in named)
    ]
    return whole[0] if len(whole) == 1 else None


def rouge_l(output: str, answer: str) -> float:
    """ROUGE-L F1 over words: the longest common subsequence against both lengths, 0 to 1.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, with beta 1.
    """
    given, wanted = words(output), words(answer)
    if not given or not wanted:
        return 0.0
    row = [0] * (len(wanted) + 1)
    for got in given:
        diagonal = 0
        for column, word in enumerate(wanted, 1):
            above = row[column]
            row[column] = diagonal + 1 if got == word else max(above, row[column - 1])
            diagonal = above
    return 2 * row[-1] / (len(given) + len(wanted))


def score(output: str, sample: Sample) -> float:
    """The output's score by the sample's metric, 0 to 1."""
    match sample.metric:
        case "words":
            return float(exact_words(output) == exact_words(sample.answer))
        case "contains":
            return float(contains(output, sample.answer))
        case "choice":
            chosen = chosen_option(output, sample.choices)
            return float(chosen is not None and chosen == right_option(sample))
        case "rouge":
            return rouge_l(output, sample.answer)


def right_option(sample: Sample) -> int:
    """Index of the right option of a multiple-choice question, whose answer is a letter or an option's text.

    Raises:
        ValueError: the answer is neither.
    """
    if sample.answer in sample.choices:
        return list(sample.choices).index(sample.answer)
    if has_letters(sample.choices):
        for index in range(len(sample.choices)):
            if letter(index) == sample.answer.strip():
                return index
    raise ValueError(f"the answer {sample.answer!r} of {sample.task}/{sample.name} is none of its choices")
