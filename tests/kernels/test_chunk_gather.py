"""Fetched chunks are the store's bit for bit, and stay so over any history of choices."""

import pytest
import torch
from hybridkv_kernels import PAGE, Backend
from hybridkv_kernels.chunk_gather import chunk_gather
from hybridkv_kernels.chunk_select import chunk_select
from hybridkv_kernels.extent_decode import DecodeTables
from hybridkv_kernels.recall.layout import LandmarkKind, LandmarkLayout
from hybridkv_kernels.recall.tables import STORE_BLOCK, RecallTables
from hybridkv_kernels.recall.work import RecallWork
from recall_cases import RecallCase, bits, chosen_chunks, index, ragged_case, recall_case

BACKENDS = ("torch", "triton")


def gather(case: RecallCase, layer: int, backend: Backend) -> None:
    """One fetch of a case."""
    chunk_gather(
        case.pool,
        case.store,
        case.row_slot,
        case.decode,
        case.recall,
        layer,
        case.layout,
        case.work,
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_store", [True, False])
@pytest.mark.parametrize(
    ("kind", "head_size", "dtype"),
    [
        ("sketch", 64, torch.float32),
        ("sketch", 128, torch.bfloat16),
        ("sketch2", 80, torch.bfloat16),
        ("mean", 80, torch.float16),
        ("minmax", 80, torch.bfloat16),
    ],
)
def test_fetches_what_is_missing(
    backend: Backend,
    with_store: bool,
    kind: LandmarkKind,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    case = ragged_case(kind, head_size, dtype, device, with_store)
    for layer in range(case.decode.num_layers):
        case.work.num_missing[: len(case.row_slot) * case.decode.num_kv_heads] = 0
        moved = 0
        want = {name: tensor.clone() for name, tensor in case.tensors().items()}
        for item, head in case.items(layer):
            resident = case.resident[head]
            away = [chunk for chunk in range(len(case.chunks[head])) if chunk not in resident]
            count = min(len(away), len(resident))
            missing = [away[place] for place in torch.randperm(len(away))[:count].sort().values.tolist()]
            freed = torch.randperm(len(resident))[:count].tolist()
            for tensors in (case.tensors(), want):
                tensors["num_missing"][item] = count
                tensors["missing"][item, :count] = index(missing, device)
                tensors["freed"][item, :count] = index(freed, device)
            for chunk, hot_slot in zip(missing, freed, strict=True):
                want["pool"][case.hot_page(head, hot_slot)] = bits(case.chunks[head][chunk])
                case.put(want["pool"], head, chunk, hot_slot)
            moved += count
        assert moved > 0
        gather(case, layer, backend)
        for name, tensor in case.tensors().items():
            assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_store", [True, False])
def test_any_history_keeps_the_books(backend: Backend, with_store: bool, device: torch.device) -> None:
    layout = LandmarkLayout("sketch", 16, 4)
    hot = [[[6, 0], [3, 9]], [[1, 4], [0, 2]]]
    rows = [(1, 0), (-1, 0), (0, 0)]
    case = recall_case([30 * PAGE + 7, 11 * PAGE], hot, rows, layout, torch.float32, device, with_store, 2)
    work = case.work
    drift = torch.randn(work.log_weight.shape) * 2
    kept, fetched = 0, 0
    for step in range(64):
        layer = step % 2
        # Weights that wander, so that some of the hot chunks stay.
        drift = drift * 0.8 + torch.randn(drift.shape)
        work.log_weight.copy_(drift)
        held = {head: set(chunks) for head, chunks in case.resident.items()}
        chunk_select(
            case.pool,
            case.row_slot,
            case.row_len,
            case.decode,
            case.recall,
            layer,
            layout,
            work,
            pin_recent=1,
            backend=backend,
        )
        gather(case, layer, backend)
        for item, head in case.items(layer):
            chunks = case.chunks[head]
            chosen = chosen_chunks(work.log_weight[item, :, : len(chunks)].cpu(), len(held[head]), 0, 1)
            where = [case.entry(head, chunk) for chunk in range(len(chunks))]
            entries = [int(bits(case.pool).flatten(1)[place]) for place in where]
            assert [chunk for chunk, hot_slot in enumerate(entries) if hot_slot >= 0] == chosen
            assert sorted(hot_slot for hot_slot in entries if hot_slot >= 0) == list(range(len(chosen)))
            assert set(entries) <= {-1, *range(len(chosen))}
            for chunk in chosen:
                page = case.pool[case.hot_page(head, entries[chunk])]
                assert torch.equal(bits(page), bits(chunks[chunk]))
            # A chunk that stays is not moved.
            for hot_slot, chunk in enumerate(case.resident[head]):
                assert entries[chunk] in (hot_slot, -1)
            case.resident[head] = [entries.index(hot_slot) for hot_slot in range(len(chosen))]
            kept += len(held[head] & set(chosen))
            fetched += len(set(chosen) - held[head])
    assert min(kept, fetched) > 200
    assert work.counters.sum(0).tolist() == [kept, fetched]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_store", [True, False])
def test_pages_past_two_billion_elements(backend: Backend, with_store: bool, device: torch.device) -> None:
    """Memory that is never touched is never committed, so tensors this large cost nothing on a CPU."""
    layout = LandmarkLayout("sketch", 64, 2)
    # So far away even when counted in int32.
    pages = 2 * (2**31 + 2**22) // (PAGE * 2 * 64) // STORE_BLOCK * STORE_BLOCK
    large = torch.empty(pages, PAGE, 128, dtype=torch.bfloat16, device=device)
    page = torch.randn(PAGE, 128, device=device).to(large.dtype)
    last = pages - 4
    if with_store:
        pool, store, arena = torch.zeros(4, PAGE, 128, dtype=large.dtype, device=device), large, [0, 1]
        large[pages - STORE_BLOCK + 9] = page
    else:
        pool, store, arena = large, None, [last, last + 1]
        large[last + 3] = page
    # One head: a page of landmarks, and then its hot slot; chunk 2 is missing.
    decode = DecodeTables(
        index([1, PAGE], device).view(1, 1, 1, 2),
        index(arena, device)[None],
        index([48], device),
        index([last + 2, last + 2, last + 3], device)[None],
    )
    recall = RecallTables(
        index([7], device).view(1, 1, 1),
        index([pages // STORE_BLOCK - 1], device)[None],
        index([48], device),
    )
    work = RecallWork.create(1, 1, 1, None, 3, 1, device)
    work.num_missing[0], work.missing[0, 0] = 1, 2
    chunk_gather(pool, store, index([0], device), decode, recall, 0, layout, work, backend)
    assert torch.equal(pool[arena[1]], page)
    landmarks = bits(pool[arena[0]]).flatten()
    assert landmarks[layout.slot_offset // 4 + 2] == 0


def test_refuses_what_does_not_fit(device: torch.device) -> None:
    case = ragged_case("sketch", 64, torch.float32, device)
    store = case.store
    assert store is not None
    case.store = store.half()
    with pytest.raises(ValueError, match="store must be of the pool's dtype"):
        gather(case, 0, "torch")
    case.store = store[:, :, 1:]
    with pytest.raises(ValueError, match="store must be contiguous"):
        gather(case, 0, "torch")
    case.store = store
    with pytest.raises(ValueError, match="layer -1"):
        gather(case, -1, "torch")
    case.work = RecallWork.create(5, 3, 3, None, 70, len(case.prompt_lens), device)
    with pytest.raises(ValueError, match="more than the buffers"):
        gather(case, 0, "torch")
