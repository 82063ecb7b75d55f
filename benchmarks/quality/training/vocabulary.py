"""The small model's tokenizer: every word of the suite is one token, anything else falls into bytes."""

from __future__ import annotations

from collections.abc import Iterable

from hybridkv_quality.lexicon import ROLES, spaced_words
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

from hybridkv_vllm.tiny_model import MAX_POSITIONS, SPECIAL_TOKENS

SPACE = "Ġ"  # How byte-level pieces write a space.


def build_tokenizer() -> Qwen2Tokenizer:
    """Merges that grow each word letter by letter from its beginning, so no other split of it can happen."""
    pieces = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    merges: dict[tuple[str, str], None] = {}
    for word in _pieces():
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
            pieces[word[: end + 1]] = None
    return Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=list(merges),
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=MAX_POSITIONS,
    )


def _pieces() -> Iterable[str]:
    for word in spaced_words():
        yield SPACE + word
    # Last, or their merges would come before those of words that contain them.
    yield from ROLES
