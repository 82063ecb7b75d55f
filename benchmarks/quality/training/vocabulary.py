"""The small model's tokenizer: every word of the suite is one token, anything else falls into bytes."""

from __future__ import annotations

from collections.abc import Iterable

from hybridkv_quality.lexicon import ROLES, spaced_words
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

from hybridkv_vllm import tiny_model

SPACE = "Ġ"  # How byte-level pieces write a space.


def build_tokenizer() -> Qwen2Tokenizer:
    """Merges that grow each word letter by letter from its beginning, so no other split of it can happen."""
    pieces = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges: dict[tuple[str, str], None] = {}
    for word in _pieces():
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
            pieces[word[: end + 1]] = None
    return tiny_model.build_tokenizer({piece: number for number, piece in enumerate(pieces)}, list(merges))


def _pieces() -> Iterable[str]:
    for word in spaced_words():
        yield SPACE + word
    # Last, or their merges would come before those of words that contain them.
    yield from ROLES
