"""Other libraries in the kernels' benchmark: they get what they would have in a server."""

from __future__ import annotations

import pytest
import torch
from speed import rivals
from speed.layer import Case, make_layer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Recorder:
    """In place of a Triton kernel: notes its grids."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        self.grids.append(grid)
        return self

    def __call__(self, *args: object, **kwargs: object) -> None:
        pass


def test_vllms_kernel_splits_small_batches_as_in_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.ops import triton_unified_attention as unified

    kernel = Recorder()
    monkeypatch.setattr(unified, "kernel_unified_attention", kernel)
    monkeypatch.setattr(unified, "reduce_segments", Recorder())
    for batch in (8, 32, 64):
        layer = make_layer(Case(batch, 16, 1.0, 1.0), DEVICE, seed=0)
        rivals.vllm_triton(layer, torch.empty_like(layer.query))()
    assert [grid[2:] for grid in kernel.grids] == [(16,), (16,), ()]


def test_xformers_gets_the_same_keys_and_values_in_pages_that_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fmha = pytest.importorskip("xformers.ops.fmha")
    layer = make_layer(Case(3, 256, 1.0, 1.0), DEVICE, seed=0)
    out, expected = torch.empty_like(layer.query), torch.empty_like(layer.query)
    run = rivals.xformers(layer, out)
    if DEVICE.type == "cpu":
        # It refuses the device, and nothing else that could be helped.
        with pytest.raises(ValueError, match="device=cpu") as refused:
            run()
        assert "page size" not in str(refused.value)

    def attend(query, key, value, attn_bias, scale, op):  # type: ignore[no-untyped-def]
        mask = attn_bias.materialize((1, 1, query.shape[1], key.shape[1]), device=query.device)[0, 0]
        scores = torch.einsum("qhgd,khgd->hgqk", query[0].float(), key[0].float()) * scale + mask
        return torch.einsum("hgqk,khgd->qhgd", scores.softmax(-1), value[0].float())[None]

    monkeypatch.setattr(fmha, "memory_efficient_attention_forward", attend)
    run()
    rivals.sdpa(layer, expected)()
    assert torch.allclose(out.float(), expected.float(), atol=1e-2)
