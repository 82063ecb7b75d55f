"""Landmarks, built and scored, against their definition, with NaN wherever nobody may look."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hybridkv_kernels import PAGE, Backend
from hybridkv_kernels.chunk_score import chunk_score
from hybridkv_kernels.chunk_score import triton as score_kernels
from hybridkv_kernels.extent_decode.work_list import WorkList
from hybridkv_kernels.recall.landmarks import Landmarks, random_rotation
from hybridkv_kernels.recall.layout import LandmarkKind, LandmarkLayout
from hybridkv_kernels.recall.reading import field, landmark_pages, page_means
from hybridkv_kernels.recall.work import RecallWork
from kernel_cases import strided_heads
from landmark_cases import RecallCase, recall_case
from torch import Tensor

PROMPTS = [16 * 37 + 5, 16 * 9, 16 * 20 + 15]
RECALLING = [
    [[True, False], [True, True]],
    [[False, True], [False, False]],
    [[True, True], [False, True]],
]
# (slot, steps since the prompt's end): padding, and one row of each slot, the second one twice.
ROWS = [(1, 0), (-1, 3), (0, 2), (2, 4), (1, 6)]
# Programs to split the pages of each layer over: few, so that a split has several, and more than there are.
TARGETS = (3, 300)
BACKENDS: tuple[Backend, ...] = ("torch", "triton")
SKETCHES: tuple[LandmarkKind, ...] = ("sketch", "sketch2")
KINDS: tuple[LandmarkKind, ...] = (*SKETCHES, "mean", "minmax")
# Of log2 weights: products in 16 bits, and signs that rounding turned.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 0.12}


def rows_of(prompts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """`row_slot` and `row_len` of ROWS."""
    slots = torch.tensor([slot for slot, _ in ROWS], dtype=torch.int32, device=device)
    lengths = torch.tensor(
        [prompts[slot] + 1 + steps for slot, steps in ROWS], dtype=torch.int32, device=device
    )
    return slots, lengths


def check_scores(case: RecallCase, group: int, dtype: torch.dtype, backend: Backend, interval: int) -> None:
    """Scores of every layer: right where a head recalls on a selecting step, untouched elsewhere.

    Torch has built the landmarks: others turn a few bits, which scores would show.
    """
    device = case.pool.device
    slots, lengths = rows_of([int(n) for n in case.recall.prompt_len], device)
    heads, head_size = case.decode.num_kv_heads, case.landmarks.layout.head_size
    scale = head_size**-0.5
    for layer in range(case.decode.num_layers):
        query = strided_heads(len(ROWS), heads * group, head_size, dtype, device)
        work = case.work(len(ROWS), group)
        chunk_score(
            query,
            case.pool,
            slots,
            lengths,
            case.decode,
            case.recall,
            layer,
            scale,
            case.landmarks,
            work,
            case.plan(slots, lengths, interval, TARGETS[layer]),
            interval=interval,
            backend=backend,
        )
        for row, (slot, steps) in enumerate(ROWS):
            for head in range(heads):
                result = work.log_weight[row * heads + head]
                recalls = slot >= 0 and int(case.recall.chunk_first[slot, layer, head]) >= 0
                if not recalls or steps % interval:
                    assert result.isnan().all()
                    continue
                chunks = int(case.recall.prompt_len[slot]) // PAGE
                assert result[:, chunks:].isnan().all()
                for member in range(group):
                    expected = case.expected(slot, layer, head, query[row, head * group + member], scale)
                    error = (result[member, :chunks].double() - expected).abs().max()
                    assert error <= TOLERANCE[dtype] * max(1.0, float(expected.abs().max()) / 10)


def score_first(case: RecallCase, query: Tensor, backend: Backend) -> Tensor:
    """Log-weights [G, C] of the first head of slot 0 at the first step after its prompt, for [1, G, D]."""
    length = case.recall.prompt_len[:1] + 1
    slot = torch.zeros_like(length)
    work = case.work(1, query.shape[1])
    chunk_score(
        query,
        case.pool,
        slot,
        length,
        case.decode,
        case.recall,
        0,
        1.0,
        case.landmarks,
        work,
        case.plan(slot, length),
        backend=backend,
    )
    return work.log_weight[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("group", "head_size", "dtype"),
    [
        (7, 128, torch.float32),
        (2, 80, torch.float32),
        (7, 128, torch.bfloat16),
        (1, 64, torch.float16),
        (3, 16, torch.float32),
    ],
)
def test_scores_follow_their_definition(
    kind: LandmarkKind,
    group: int,
    head_size: int,
    dtype: torch.dtype,
    backend: Backend,
    device: torch.device,
) -> None:
    case = recall_case(PROMPTS, RECALLING, kind, head_size, dtype, device)
    check_scores(case, group, dtype, backend, interval=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_between_selections_are_left_alone(
    kind: LandmarkKind, backend: Backend, device: torch.device
) -> None:
    case = recall_case(PROMPTS, RECALLING, kind, 64, torch.float32, device)
    check_scores(case, 2, torch.float32, backend, interval=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_build_the_same(kind: LandmarkKind, dtype: torch.dtype, device: torch.device) -> None:
    """Byte for byte but for the rounding of scales and means and the few bits of products near a limit."""
    seen = []
    for backend in BACKENDS:
        torch.manual_seed(3)
        case = recall_case(PROMPTS, RECALLING, kind, 128, dtype, device, backend=backend)
        layout = case.landmarks.layout
        heads = torch.tensor([0, 1], device=device)
        pages = landmark_pages(0, 1, heads, PROMPTS[0] // PAGE, case.decode, layout)
        chunks = PROMPTS[0] // PAGE
        fields = [field(case.pool, pages, layout, 0, layout.data_bytes)[:, :chunks]]
        fields.append(field(case.pool, pages, layout, layout.slot_offset, 4)[:, :chunks])
        seen.append((fields, case, page_means(case.pool, pages, layout) if kind in SKETCHES else None))
    (data, slots), (data_triton, slots_triton) = seen[0][0], seen[1][0]
    assert torch.equal(slots, slots_triton)
    first = slots.contiguous().view(torch.int32)[0, :, 0]
    expected = torch.full_like(first, -1)
    expected[seen[0][1].hot[0]] = torch.arange(2, dtype=torch.int32, device=device)
    assert torch.equal(first, expected)
    if kind in SKETCHES:
        bits = torch.arange(8, dtype=torch.uint8, device=device)
        differing = ((data ^ data_triton)[..., None] >> bits & 1).float().mean()
        assert differing < 1e-3
        mean, mean_triton = seen[0][2], seen[1][2]
        # One level, where rounding fell the other way.
        assert (mean - mean_triton).abs().max() <= 1.01 * mean.abs().max() / 127
        assert (mean - mean_triton).abs().mean() < 1e-3 * mean.abs().mean()
    else:
        values, values_triton = (d.contiguous().view(dtype).float() for d in (data, data_triton))
        assert torch.allclose(values, values_triton, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_layout_fields_fill_a_page_and_do_not_overlap() -> None:
    for kind in KINDS:
        for head_size in (16, 64, 80, 128, 256):
            for itemsize in (2, 4):
                layout = LandmarkLayout(kind, head_size, itemsize)
                record = layout.data_bytes + layout.scale_bytes + 4
                end = layout.mean_offset + layout.mean_bytes
                assert layout.slot_offset % 4 == layout.mean_offset % 4 == layout.scale_offset % 2 == 0
                assert layout.places * record == layout.mean_offset
                assert end <= layout.page_bytes < end + record
                assert layout.mean_bytes == (4 + head_size if kind in SKETCHES else 0)
                assert layout.places >= 2, "the score's tile of two chunks lies within a page"
                assert layout.pages(layout.places) == 1
                assert layout.pages(layout.places + 1) == 2


def test_a_sketch_costs_what_the_documentation_says() -> None:
    """18 or 34 bytes a token of 512 at head size 128, the index of the hot slot, and a mean a page."""
    for kind, token_bytes, share in (("sketch", 18, 0.037), ("sketch2", 34, 0.072)):
        layout = LandmarkLayout(kind, 128, 2)
        assert layout.data_bytes + layout.scale_bytes == token_bytes * PAGE
        assert layout.pages(2048) / 2048 == pytest.approx(share, abs=0.002)


def test_two_bits_estimate_better_than_one(device: torch.device) -> None:
    """Of single products, as a chunk of sixteen equal keys shows them."""
    for head_size in (64, 128):
        keys = torch.randn(1, 1, 256, head_size).repeat_interleave(PAGE, dim=2)
        query = torch.randn(1, 1, head_size, device=device)
        errors = []
        for kind in SKETCHES:
            case = recall_case([256 * PAGE], [[[True]]], kind, head_size, torch.float32, device, keys=[keys])
            estimate = score_first(case, query, "torch")[0, :256]
            exact = (case.keys[0][0, 0, ::PAGE] @ query[0, 0] + math.log(PAGE)) / math.log(2)
            errors.append(float((estimate - exact).square().mean().sqrt()))
        assert errors[1] <= 0.6 * errors[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SKETCHES)
def test_a_bias_that_a_page_shares_costs_no_precision(
    kind: LandmarkKind, backend: Backend, device: torch.device
) -> None:
    """Keys share a bias 20 times their size, another one on each landmark page: as positions turn it."""
    chunks, size = 64, 64
    places = LandmarkLayout(kind, size, 4).places
    content = torch.randn(1, 1, chunks, size)
    bias = 20 * torch.randn(-(-chunks // places), size)[torch.arange(chunks) // places]
    keys = (content + bias).repeat_interleave(PAGE, dim=2)
    query = torch.randn(1, 1, size, device=device)
    case = recall_case(
        [chunks * PAGE], [[[True]]], kind, size, torch.float32, device, keys=[keys], backend=backend
    )
    estimate = score_first(case, query, backend)[0, :chunks]
    exact = (case.keys[0][0, 0, ::PAGE] @ query[0, 0] + math.log(PAGE)) / math.log(2)
    error = (estimate - exact).abs()
    # What sketches of keys without a bias err by, and the rounding of such large sums.
    noise = float(query.norm()) * float(content.norm(dim=-1).max()) / size**0.5 / math.log(2)
    assert error.max() < 4 * noise + 1e-6 * float(exact.abs().max())


def test_a_key_that_is_the_mean_has_no_sketch(device: torch.device) -> None:
    """Nothing is left of it but rounding: the score is the query's product with the mean."""
    keys = torch.randn(64).expand(1, 1, 2 * PAGE, 64).bfloat16().float().contiguous()
    query = torch.randn(1, 1, 64, device=device)
    for kind, backend in itertools.product(SKETCHES, BACKENDS):
        case = recall_case(
            [2 * PAGE], [[[True]]], kind, 64, torch.float32, device, keys=[keys], backend=backend
        )
        estimate = score_first(case, query, backend)[0, :2]
        exact = (case.keys[0][0, 0, ::PAGE] @ query[0, 0] + math.log(PAGE)) / math.log(2)
        assert (estimate - exact).abs().max() < 2e-3 * query.norm() * keys[0, 0, 0].norm()


@pytest.mark.parametrize("kind", SKETCHES)
def test_what_lies_beyond_the_last_chunk_does_not_matter(kind: LandmarkKind, device: torch.device) -> None:
    """Places without a chunk are scored with the rest: whatever they hold stays out of the result."""
    seen = []
    for garbage in (0x00, 0xFF):
        torch.manual_seed(5)
        case = recall_case([5 * PAGE], [[[True]]], kind, 64, torch.float32, device)
        layout = case.landmarks.layout
        page = int(landmark_pages(0, 0, torch.tensor([0], device=device), 5, case.decode, layout)[0, 0])
        raw = case.pool.view(torch.uint8).flatten(1)[page]
        raw[5 * layout.data_bytes : layout.scale_offset] = garbage
        raw[layout.scale_offset + 5 * layout.scale_bytes : layout.slot_offset] = garbage
        query = torch.randn(1, 2, 64, device=device)
        weights = score_first(case, query, "triton")
        assert weights[:, 5:].isnan().all()
        seen.append(weights[:, :5])
    assert torch.equal(*seen)


@pytest.mark.parametrize(("kind", "kernel"), [("sketch2", "sketch_kernel"), ("minmax", "bound_kernel")])
def test_longer_prompts_that_may_come_start_no_programs(
    kind: LandmarkKind, kernel: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = recall_case([16 * PAGE], [[[True, False]]], kind, 64, torch.float32, device)
    row_slot, row_len = torch.tensor([[0], [16 * PAGE + 1]], dtype=torch.int32, device=device)
    plan = case.plan(row_slot, row_len)
    programs = []
    original = getattr(score_kernels, kernel)

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            programs.append(math.prod(grid))
            return original[grid]

    monkeypatch.setattr(score_kernels, kernel, Recorded())
    query = torch.randn(1, 4, 64, device=device)
    for max_chunks in (16, 60_000):
        work = RecallWork.create(1, 2, 4, case.landmarks, max_chunks, 1, device)
        where = (case.pool, row_slot, row_len, case.decode, case.recall, 0, 1.0, case.landmarks, work, plan)
        chunk_score(query, *where, backend="triton")
    pages = case.landmarks.layout.pages(16)
    assert programs == [min(2 * pages, 2 + plan.target_programs), 2 + plan.target_programs]


def test_rotation_is_orthogonal_fixed_and_mixes_every_dimension(device: torch.device) -> None:
    for head_size in (16, 24, 64, 80, 96, 128, 256):
        rotation = random_rotation(head_size, device)
        product = rotation.double() @ rotation.double().T
        assert torch.allclose(product, torch.eye(head_size, dtype=torch.float64, device=device), atol=1e-5)
        assert torch.equal(rotation, random_rotation(head_size, device))
        assert rotation.abs().max() < 0.6


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    case = recall_case(PROMPTS, RECALLING, "mean", 64, torch.float32, device)
    slots, lengths = rows_of(PROMPTS, device)
    query = torch.randn(len(ROWS), 4, 64, device=device)
    work = case.work(len(ROWS), 2)

    def score(
        landmarks: Landmarks,
        layer: int = 0,
        interval: int = 1,
        rows: int = len(ROWS),
        plan: WorkList | None = None,
        backend: Backend = "torch",
    ) -> None:
        chunk_score(
            query,
            case.pool,
            slots[:rows],
            lengths,
            case.decode,
            case.recall,
            layer,
            1.0,
            landmarks,
            work,
            plan,
            interval=interval,
            backend=backend,
        )

    with pytest.raises(ValueError, match=r"pool must be contiguous \[P, 16, 256\]"):
        score(Landmarks.create("mean", 128, torch.float32, device))
    with pytest.raises(ValueError, match="elements of 2 bytes"):
        score(Landmarks.create("mean", 64, torch.bfloat16, device))
    with pytest.raises(ValueError, match="layer 2"):
        score(case.landmarks, layer=2)
    with pytest.raises(ValueError, match="interval"):
        score(case.landmarks, interval=0)
    with pytest.raises(ValueError, match="row_slot"):
        score(case.landmarks, rows=1)
    plan = case.plan(slots, lengths)
    with pytest.raises(ValueError, match="needs a plan"):
        score(case.landmarks, backend="triton")
    with pytest.raises(ValueError, match="updated for interval 1, not 2"):
        score(case.landmarks, interval=2, plan=plan, backend="triton")
    with pytest.raises(ValueError, match="no score plan for landmarks"):
        score(case.landmarks, plan=replace(plan, places=plan.places + 1), backend="triton")
    with pytest.raises(ValueError, match="no score plan for landmarks"):
        score(case.landmarks, plan=replace(plan, part="recalling"), backend="triton")
    plan.update(slots[:1], lengths[:1], case.decode, case.recall)
    with pytest.raises(ValueError, match=f"updated for 1 rows, not {len(ROWS)}"):
        score(case.landmarks, plan=plan, backend="triton")
    with pytest.raises(ValueError, match="does not exist"):
        LandmarkLayout("median", 64, 4)
