"""Which heads recall chunks, and where all of their chunks are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pages import check_index, require

STORE_BLOCK = 64
"""Pages of a store block, the unit in which the host tier is given out."""


@dataclass(frozen=True)
class RecallTables:
    """The tables of S request slots, of L layers and H KV heads.

    A head that recalls owns a run of logical arena pages: its landmarks, then its hot slots. Its extent (see
    `DecodeTables`) is the hot slots, all of them full, so the landmarks are the pages just before the
    extent. Chunk c of such a head is the prompt's tokens 16c .. 16c+15; the prompt has `prompt_len // 16`
    chunks. With a host tier its keys and values are logical store page `j = chunk_first + c`, which is page
    `store_blocks[j // 64] * 64 + j % 64` of the store; without one they stay in the prompt's ordinary blocks.

    Attributes:
        chunk_first: [S, L, H] int32, -1 for a head that does not recall.
        store_blocks: [S, C] int32 ids of store blocks; C at least 1.
        prompt_len: [S] int32, T, tokens of the prompt.

    Raises:
        ValueError: for a shape, dtype or stride that does not fit. Indices are not checked.
    """

    chunk_first: Tensor
    store_blocks: Tensor
    prompt_len: Tensor

    def __post_init__(self) -> None:
        slots = self.chunk_first.shape[0]
        check_index("chunk_first", self.chunk_first, torch.int32, slots, -1, -1)
        check_index("store_blocks", self.store_blocks, torch.int32, slots, -1)
        check_index("prompt_len", self.prompt_len, torch.int32, slots)
        require(self.store_blocks.shape[1] > 0, "store_blocks needs a column")
