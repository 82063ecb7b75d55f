"""The words that the suite's questions, answers and pictures are made of."""

from __future__ import annotations

from types import MappingProxyType

# Far enough apart to be told from each other with noise on top.
COLOURS = MappingProxyType(
    {
        "red": (205, 35, 40),
        "green": (30, 135, 55),
        "blue": (35, 65, 200),
        "yellow": (235, 215, 45),
        "orange": (240, 130, 20),
        "purple": (125, 45, 165),
        "cyan": (70, 205, 215),
        "pink": (245, 155, 195),
    }
)
# Letters that fit half a cell, and that no other one of these is mistaken for.
GLYPHS = tuple("ABCDEFGHIJKLMNOPQRSTUVXYZabdefghnqrt")

# fmt: off
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth",
    "eighteenth", "nineteenth", "twentieth",
)
NUMBERS = ("one", "two", "three")
# How often a colour occurs that is asked for. Attention tells numbers apart by their ratio, and the small
# model's is not exact enough for two against three.
COUNTS = (1, 3)
# Names of notes (text needles).
NAMES = (
    "harbour", "lantern", "meadow", "orchard", "pepper", "quarry", "ribbon", "saddle", "thunder",
    "velvet", "willow", "anchor",
)
# What the text between pictures is about: nothing.
FILLER = (
    "the", "old", "small", "river", "train", "morning", "road", "window", "winter", "garden", "letter",
    "voice", "street", "bread", "stone", "clock", "music", "went", "came", "stood", "looked", "carried",
    "opened", "found", "left", "near", "under", "over", "behind", "before", "while", "and", "but",
    "then", "again", "slowly", "quietly", "late", "early", "they", "she", "he", "we", "it", "was",
    "had", "been", "would", "could",
)
# fmt: on
# Verbs of questions, marks of answers.
FIND, FOLLOW, SHOW, NEXT, COUNT = "find", "follow", "show", "next", "count"
RECITE, NOTE, COMMA = "recite", "note", ","
ROLES = ("user", "assistant", "system")


def spaced_words() -> tuple[str, ...]:
    """All words that are one token with a space before them."""
    verbs = (FIND, FOLLOW, SHOW, NEXT, COUNT, RECITE, NOTE, COMMA)
    return (*COLOURS, *GLYPHS, *ORDINALS, *NUMBERS, *NAMES, *verbs, *FILLER)
