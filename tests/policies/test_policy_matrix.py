"""Every policy with every classifier on every kind of prompt: what must hold whatever the method."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import (
    CASES,
    PAGE,
    Allocation,
    floored,
    page_counts,
    random_scores,
    recalls,
    rounded,
    weighted,
    window_in_arena,
)

from hybridkv_vllm.policies import (
    CLASSIFIERS,
    POLICIES,
    PolicyOptions,
    PromptScores,
    Recall,
    Selection,
    get_policy,
    select,
)

RECALLING = [name for name, policy in POLICIES.items() if policy.recalls]
PAGES = tuple(page_counts(CASES["usual"]))


def choose(
    policy: str, scores: PromptScores, pages: int, options: PolicyOptions, recall: Recall | None = None
) -> Selection:
    chosen = get_policy(policy)
    return chosen.select(scores, chosen.classify(scores, options), pages, options, recall)


def pooled(scores: PromptScores, layer: int, head: int) -> list[float]:
    """Max over a token and three neighbours each side, none across the observation window's start."""
    mass = scores.mass[layer, head].tolist()
    past = max(0, len(mass) - scores.window)
    ends = [(0, past) if position < past else (past, len(mass)) for position in range(scores.compressible)]
    return [max(mass[max(low, i - 3) : min(high, i + 4)]) for i, (low, high) in enumerate(ends)]


def ranked(policy: str, scores: PromptScores, dynamic: bool, layer: int, head: int, length: int) -> list[int]:
    """Token positions, the first to be kept first; `length` are going to be."""
    positions = range(scores.compressible)
    if policy == "streamingllm":
        return [*positions[:4], *reversed(positions[4:])]
    text_prior = policy in ("full", "lookm") or (policy.startswith("hybridkv") and not dynamic)
    if policy == "lookm":
        score, recent = scores.mass[layer, head].tolist(), scores.compressible - length // 2
    else:
        score, recent = pooled(scores, layer, head), scores.tokens - scores.window

    def key(position: int) -> tuple[bool, bool, float, int]:
        late = bool(text_prior and scores.is_visual[position])
        return position < recent, position < recent and late, -score[position], position

    return sorted(positions, key=key)


def best_chunks(scores: PromptScores, layer: int, head: int) -> list[int]:
    """Chunks by the sum of their tokens' mass, rounded once; among equals the lower first."""
    mass = scores.mass[layer, head].tolist()
    chunks = range(scores.compressible // PAGE)
    exact = [math.fsum(mass[PAGE * chunk : PAGE * (chunk + 1)]) for chunk in chunks]
    score = torch.tensor(exact, dtype=torch.float32).tolist()
    return sorted(chunks, key=lambda chunk: (-score[chunk], chunk))


def ada_pages(scores: PromptScores, pages: int, window: int) -> list[int]:
    """Layers share evenly; a layer's best tokens, whosesoever they are, say how its heads share."""
    layers, heads = scores.mass.shape[:2]
    each, surplus = divmod(min(pages, scores.heads * scores.capacity), layers)
    found = []
    for layer in range(layers):
        given = each + (layer < surplus)
        tokens = [
            (position < scores.tokens - scores.window, -score, position, head)
            for head in range(heads)
            for position, score in enumerate(pooled(scores, layer, head))
        ]
        owners = [head for *_, head in sorted(tokens)[: PAGE * given]]
        weight = [max(1, owners.count(head) - window) for head in range(heads)]
        floor = floored(each, heads, window, Fraction(1, 5))
        found += weighted(weight, given, floor, scores.capacity)
    return found


def pyramid_pages(scores: PromptScores, pages: int, window: int) -> list[int]:
    """Beside the window, from 39 twentieths of the mean down to one; all heads of a layer alike."""
    layers, heads = scores.mass.shape[:2]
    column = min(pages // heads, layers * scores.capacity)
    floor = floored(column, layers, window, Fraction(0))
    mean = Fraction(column, layers) - floor
    first = min(mean * Fraction(39, 20), Fraction(scores.capacity - floor))
    step = 2 * (first - mean) / max(1, layers - 1)
    share = [mean] if layers == 1 else [first - step * layer for layer in range(layers)]
    return [floor + whole for whole in rounded(share) for _ in range(heads)]


def visual_pages(scores: PromptScores, pages: int, window: int) -> list[int]:
    """All heads compete by the mass that they put on visual tokens, rounded once."""
    visual = (scores.mass * scores.is_visual).flatten(0, 1).tolist()
    mass = torch.tensor([math.fsum(row) for row in visual], dtype=torch.float32).tolist()
    given = min(pages, scores.heads * scores.capacity)
    floor = floored(given, scores.heads, window, Fraction(1, 10))
    return weighted([max(1, int(min(1.0, m) * 2**30)) for m in mass], given, floor, scores.capacity)


def weighed(sparsity: torch.Tensor, options: PolicyOptions) -> list[float]:
    """What the weight is one minus of."""
    for_weight = {"dense": sparsity, "sparse": 1 - sparsity, "even": 0 * sparsity}
    return for_weight[options.static_weight].flatten().tolist()


def expected_pages(
    policy: str, scores: PromptScores, pages: int, options: PolicyOptions, selection: Selection, least: int
) -> list[int]:
    """Heads that do not recall are static; the window counts only where it lies in the arena."""
    capacity = scores.compressible // PAGE
    window = window_in_arena(scores)
    if policy in ("lookm", "snapkv", "streamingllm"):
        return [min(pages // scores.heads, capacity)] * scores.heads
    if policy == "adakv":
        return ada_pages(scores, pages, window)
    if policy == "pyramidkv":
        return pyramid_pages(scores, pages, window)
    if policy == "sparsemm":
        return visual_pages(scores, pages, window)
    # Quest's heads are equals, but that those that recall get their least.
    quest = policy == "quest"
    return Allocation(
        sparsity=[0.0] * scores.heads if quest else weighed(selection.sparsity, options),
        dynamic=selection.recalled.flatten().tolist(),
        pages=pages,
        capacity=capacity,
        window=window,
        share_ppm=10**6 if quest else round(options.dynamic_share * 10**6),
        least=least,
    ).expected()


def expected_recalling(selection: Selection, recall: Recall) -> list[int]:
    """The most dynamic of the dynamic heads in the tier, by their number in (layer, KV head) order."""
    figure = selection.figure.flatten().tolist()
    in_tier = (selection.dynamic & recall.heads).flatten().tolist()
    candidates = [head for head, found_room in enumerate(in_tier) if found_room]
    return sorted(sorted(candidates, key=lambda head: (figure[head], head))[: recall.most_heads])


def check(
    policy: str, scores: PromptScores, pages: int, options: PolicyOptions, recall: Recall | None
) -> None:
    selection = choose(policy, scores, pages, options, recall)
    layers, heads = scores.mass.shape[:2]
    most = scores.heads * scores.capacity
    in_force = recall if get_policy(policy).recalls and pages < most else None
    landmark_pages, least = (in_force.landmark_pages, in_force.least_pages) if in_force else (0, 0)
    if policy == "hybridkv-paper" and in_force:
        least = landmark_pages + 1

    assert selection.keep.shape == (layers, heads, scores.compressible)
    assert selection.keep.dtype == selection.dynamic.dtype == selection.recalled.dtype == torch.bool
    assert selection.lengths.dtype == selection.first_page.dtype == selection.pages.dtype == torch.int32
    assert selection.figure.dtype == selection.sparsity.dtype == torch.float32
    assert torch.isfinite(selection.figure).all()
    assert torch.isfinite(selection.sparsity).all()
    assert torch.equal(selection.dynamic, (selection.figure < options.theta) | (policy == "quest"))
    recalling = [head for head, it in enumerate(selection.recalled.flatten().tolist()) if it]
    assert recalling == (expected_recalling(selection, in_force) if in_force else [])

    assert torch.equal(selection.lengths, selection.keep.sum(-1, dtype=torch.int32))
    landmarks = selection.recalled.int() * landmark_pages
    assert torch.equal(selection.pages, landmarks - -selection.lengths // PAGE)
    used = selection.pages.flatten().tolist()
    assert sum(used) <= pages
    assert used == expected_pages(policy, scores, pages, options, selection, least)
    if pages >= most:
        assert selection.keep.all()
    if pages >= scores.heads:
        assert min(used) >= 1
    if recalling:
        theirs = [used[head] for head in recalling]
        assert max(theirs) - min(theirs) <= 1
        assert min(theirs) >= min(least, pages // scores.heads)

    starts = torch.tensor([0, *itertools.accumulate(used)][:-1]).view(layers, heads)
    assert torch.equal(selection.first_page, starts + landmarks)

    dest = selection.dest()
    assert dest.dtype == torch.int32
    for layer, head in itertools.product(range(layers), range(heads)):
        length = int(selection.lengths[layer, head])
        kept = selection.keep[layer, head].nonzero().flatten().tolist()
        if selection.recalled[layer, head]:
            hot = int(selection.pages[layer, head]) - landmark_pages
            chunks = sorted(best_chunks(scores, layer, head)[:hot])
            assert hot >= 1
            assert kept == [PAGE * chunk + token for chunk in chunks for token in range(PAGE)]
        else:
            dynamic = bool(selection.dynamic[layer, head])
            assert kept == sorted(ranked(policy, scores, dynamic, layer, head, length)[:length])
        assert dest[layer, head][kept].tolist() == list(range(length))
    assert (dest[~selection.keep] == -1).all()

    again = choose(policy, scores, pages, options, recall)
    assert all(torch.equal(getattr(again, name), value) for name, value in vars(selection).items())


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_on_every_prompt(policy: str, classifier: str, case: str, pages: str) -> None:
    scores = CASES[case]
    arena = page_counts(scores)[pages]
    options = PolicyOptions(classifier=classifier)
    for recall in recalls(scores, arena).values():
        if policy == "full" and arena < scores.heads * scores.capacity:
            with pytest.raises(ValueError, match="'full' needs"):
                choose(policy, scores, arena, options, recall)
        else:
            check(policy, scores, arena, options, recall)


def test_recalling_is_tried() -> None:
    """The prompts and arenas above must not all be too small for it."""
    tried = {
        (case, count)
        for case, scores in CASES.items()
        for count, pages in page_counts(scores).items()
        if len(recalls(scores, pages)) > 1
    }
    assert {case for case, _ in tried} >= {"long", "broad_and_long", "all_tied_long"}
    assert {count for _, count in tried} >= {"half", "one_short"}
    scores = CASES["long"]
    options, pages = PolicyOptions(classifier="sparsity"), page_counts(scores)["half"]
    selection = choose("hybridkv", scores, pages, options, recalls(scores, pages)["all_5"])
    assert 0 < int(selection.recalled.sum()) < scores.heads
    limited = [
        recall.most_heads
        for scores in CASES.values()
        for pages in page_counts(scores).values()
        for recall in recalls(scores, pages).values()
        if recall and recall.most_heads < scores.heads
    ]
    assert len(set(limited)) > 1, "somewhere only some heads may recall"


@settings(max_examples=150, deadline=None, database=None)
@given(data=st.data())
def test_random_prompts(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(16, 300), "tokens")
    scores = random_scores(
        data.draw(st.integers(0, 2**20), "seed"),
        layers=data.draw(st.integers(1, 3), "layers"),
        heads=data.draw(st.integers(1, 4), "heads"),
        group=data.draw(st.integers(1, 3), "group"),
        window=data.draw(st.integers(1, min(tokens, 40)), "window"),
        tokens=tokens,
        visual=(data.draw(st.integers(0, tokens), "start"), data.draw(st.integers(0, tokens), "end")),
    )
    policy = data.draw(st.sampled_from([name for name in POLICIES if name != "full"]), "policy")
    options = PolicyOptions(
        classifier=data.draw(st.sampled_from(list(CLASSIFIERS)), "classifier"),
        theta=data.draw(st.floats(0, 1), "theta"),
        dynamic_share=data.draw(st.floats(0, 1), "dynamic_share"),
        static_weight=data.draw(st.sampled_from(["dense", "sparse", "even"]), "static_weight"),
    )
    pages = data.draw(st.integers(0, scores.heads * scores.capacity + 3), "pages")
    found = recalls(scores, pages, data.draw(st.integers(0, 2**20), "found"))
    check(policy, scores, pages, options, data.draw(st.sampled_from(list(found.values())), "recall"))


@settings(max_examples=150, deadline=None, database=None)
@given(data=st.data())
def test_any_recall_that_fits(data: st.DataObject) -> None:
    """Numbers other than `recall_limits` says: any least, and any number of heads that have a chunk."""
    scores = random_scores(data.draw(st.integers(0, 2**20), "seed"), tokens=180, visual=(10, 160))
    pages = data.draw(st.integers(2 * scores.heads, (scores.capacity + 1) * scores.heads), "pages")
    landmark_pages = data.draw(
        st.integers(0, min(pages // scores.heads + 2, scores.capacity - 1)), "landmark_pages"
    )
    floor = -(-window_in_arena(scores) // PAGE) + 1
    all_fit = landmark_pages < pages // scores.heads
    most_heads = max(
        (
            number
            for number in range(scores.heads + 1)
            if all_fit or number * (landmark_pages + 1) + (scores.heads - number) * floor <= pages
        ),
        default=0,
    )
    heads = data.draw(st.lists(st.booleans(), min_size=scores.heads, max_size=scores.heads), "heads")
    recall = Recall(
        heads=torch.tensor(heads).view(scores.mass.shape[:2]),
        landmark_pages=landmark_pages,
        least_pages=data.draw(st.integers(landmark_pages + 1, scores.capacity + 9), "least_pages"),
        most_heads=data.draw(st.integers(0, most_heads), "most_heads"),
    )
    options = PolicyOptions(
        classifier=data.draw(st.sampled_from(list(CLASSIFIERS)), "classifier"),
        dynamic_share=data.draw(st.floats(0, 1), "dynamic_share"),
        static_weight=data.draw(st.sampled_from(["dense", "sparse", "even"]), "static_weight"),
    )
    check(data.draw(st.sampled_from(RECALLING), "policy"), scores, pages, options, recall)


@pytest.mark.parametrize("policy", RECALLING)
def test_landmarks_that_do_not_fit_are_refused(policy: str) -> None:
    scores = CASES["long"]
    # Two pages of window and one beside it: 47 pages hold 5 heads of 8 pages and one of 3, but no 6.
    recall = Recall(torch.ones(2, 3, dtype=torch.bool), landmark_pages=7, least_pages=11, most_heads=6)
    message = "7 landmark pages and a chunk for each of 6 heads do not fit in 47 pages of 6 heads"
    with pytest.raises(ValueError, match=message):
        choose(policy, scores, 47, PolicyOptions(), recall)
    selection = choose(policy, scores, 47, PolicyOptions(theta=1.0), replace(recall, most_heads=5))
    assert int(selection.recalled.sum()) == 5
    assert (selection.pages[selection.recalled] >= 8).all()
    with pytest.raises(ValueError, match="for each of 5 heads do not fit in 42 pages"):
        choose(policy, scores, 42, PolicyOptions(), replace(recall, most_heads=5))


def test_impossible_recalls_are_refused() -> None:
    heads = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="least_pages"):
        Recall(heads, landmark_pages=7, least_pages=7, most_heads=6)
    with pytest.raises(ValueError, match="most_heads"):
        Recall(heads, landmark_pages=7, least_pages=8, most_heads=-1)


@pytest.mark.parametrize("policy", RECALLING)
def test_the_most_dynamic_heads_recall(policy: str) -> None:
    scores = random_scores(30, layers=2, heads=3, tokens=400, window=20, visual=(20, 370))
    chosen, options = get_policy(policy), PolicyOptions(theta=1.0)
    figure = torch.tensor([[0.5, 0.25, 0.75], [0.25, 0.0, 0.25]])
    verdict = replace(chosen.classify(scores, options), dynamic=figure < 1, figure=figure)
    in_tier = torch.tensor([[True, True, True], [True, False, True]])
    recalling = []
    for most_heads in range(7):
        recall = Recall(in_tier, landmark_pages=2, least_pages=6, most_heads=most_heads)
        selection = chosen.select(scores, verdict, 30, options, recall)
        recalling.append(selection.recalled.flatten().nonzero().flatten().tolist())
    # By figure, ties to the first; the most dynamic of all found no room in the tier.
    assert recalling == [[], [1], [1, 3], [1, 3, 5], [0, 1, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5]]


def test_chunks_compete_by_their_sum_and_ties_go_to_the_lower() -> None:
    score = torch.zeros(1, 2, 4 * PAGE)
    score[0, 0, 2 * PAGE] = 1.0  # one token with all of it
    score[0, 0, 3 * PAGE :] = 0.125  # many with twice as much
    kept = select.keep_chunks(score, torch.tensor([[2, 3]]))
    chunks = kept.view(1, 2, 4, PAGE)
    assert torch.equal(chunks.all(-1), chunks.any(-1))
    assert chunks[0, :, :, 0].tolist() == [[False, False, True, True], [True, True, True, False]]
    assert not select.keep_chunks(score, torch.zeros(1, 2, dtype=torch.int64)).any()


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"full", "lookm", "streamingllm"}))
def test_window_is_kept_wherever_it_fits(policy: str) -> None:
    scores = random_scores(20, tokens=240, window=40, visual=(10, 190))
    in_window = torch.arange(240) >= 200
    for pages in range(3 * scores.heads, scores.heads * scores.capacity, 5):
        selection = choose(policy, scores, pages, PolicyOptions())
        # The floor is the window: three pages a head hold it whatever the weights are.
        assert (selection.pages >= 3).all()
        assert selection.keep[..., in_window].all()


def test_text_comes_before_visual_and_snapkv_makes_no_difference() -> None:
    scores = CASES["long"]
    text = ~scores.is_visual[: scores.compressible]
    pages = scores.heads * 9
    hybrid = choose("hybridkv", scores, pages, PolicyOptions(theta=0.0))
    snap = choose("snapkv", scores, pages, PolicyOptions())
    roomy = hybrid.lengths >= int(text.sum())
    assert roomy.any()
    assert hybrid.keep[roomy][:, text].all()
    assert not (hybrid.keep & ~text)[~roomy].any()
    assert not snap.keep[..., text].all()


def test_a_dynamic_head_that_cannot_recall_is_pruned_by_votes() -> None:
    scores = CASES["long"]
    pages = scores.heads * 9
    even = PolicyOptions(classifier="sparsity", theta=1.0, static_weight="even")
    dynamic = choose("hybridkv", scores, pages, even)
    assert dynamic.dynamic.all()
    assert not dynamic.recalled.any()
    snap = choose("snapkv", scores, pages, PolicyOptions())
    assert torch.equal(dynamic.lengths, snap.lengths)
    assert torch.equal(dynamic.keep, snap.keep)


@pytest.mark.parametrize("scale", [2.0**-1, 2.0**-60, 2.0**-120])
def test_closest_scores_still_rank_visual_tokens(scale: float) -> None:
    """Neighbouring fp32 numbers: a key that added the class to the score would lose their order."""
    tokens = 128
    mass = (1 + torch.arange(tokens) * 2.0**-23).mul(scale).expand(1, 1, tokens).contiguous()
    scores = PromptScores(mass, torch.ones_like(mass), torch.ones(tokens, dtype=torch.bool), 1, 1, tokens)
    keep = choose("hybridkv", scores, 2, PolicyOptions()).keep[0, 0]
    # Pooling spreads the last token before the window, at 126, no further than 126 itself.
    assert keep[tokens - 32 :].all()


def test_broken_scores_never_overrun_the_arena() -> None:
    usual = CASES["usual"]
    broken = PromptScores(
        torch.full_like(usual.mass, float("nan")),
        torch.full_like(usual.votes, float("nan")),
        usual.is_visual,
        usual.window,
        usual.group,
        usual.compressible,
    )
    recall = Recall(torch.ones(2, 3, dtype=torch.bool), landmark_pages=1, least_pages=2, most_heads=6)
    recalling = set()
    for policy, classifier in itertools.product(POLICIES.keys() - {"full"}, CLASSIFIERS):
        selection = choose(policy, broken, usual.heads * 2, PolicyOptions(classifier=classifier), recall)
        assert int(selection.pages.sum()) == usual.heads * 2
        if selection.recalled.any():
            recalling.add((policy, classifier))
        assert (selection.lengths[selection.recalled] == PAGE).all()
        assert torch.isfinite(selection.figure).all()
    # By `union` no token of such a head matters: it is static, and so the method's own choice prunes it.
    assert recalling == {*itertools.product(RECALLING, CLASSIFIERS)} - {("hybridkv", "union")}


def test_budget_share() -> None:
    for name, policy in POLICIES.items():
        assert policy.budget_share(0.1) == (1.0 if name == "full" else 0.1)


def test_who_recalls_and_what_each_defines_itself() -> None:
    found = {name: (policy.recalls, policy.classifier, policy.landmark) for name, policy in POLICIES.items()}
    assert found == {
        "adakv": (False, None, None),
        "full": (False, None, None),
        "hybridkv": (True, None, None),
        "hybridkv-paper": (True, "sparsity", "mean"),
        "lookm": (False, None, None),
        "pyramidkv": (False, None, None),
        "quest": (True, None, "minmax"),
        "snapkv": (False, None, None),
        "sparsemm": (False, None, None),
        "streamingllm": (False, None, None),
    }


def test_unknown_names_list_the_known_ones() -> None:
    known = "adakv, full, hybridkv, hybridkv-paper, lookm, pyramidkv, quest, snapkv, sparsemm, streamingllm"
    with pytest.raises(ValueError, match=f"'snap': choose one of {known}"):
        get_policy("snap")
    with pytest.raises(ValueError, match="'mass': choose one of sparsity, text_mass, top_mass, union"):
        get_policy("snapkv").classify(CASES["usual"], PolicyOptions(classifier="mass"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"votes": torch.zeros(2, 3, 76)}, "mass and votes"),
        ({"is_visual": torch.zeros(64, dtype=torch.bool)}, "is_visual"),
        ({"window": 0}, "window and group"),
        ({"group": 0}, "window and group"),
        ({"compressible": 63}, "compressible"),
        ({"compressible": 0}, "compressible"),
        ({"compressible": 80}, "compressible"),
    ],
)
def test_scores_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptScores(**{**vars(CASES["usual"]), **change})


@pytest.mark.parametrize("change", [{"theta": 1.1}, {"theta": float("nan")}, {"dynamic_share": -0.1}])
def test_options_out_of_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        PolicyOptions(**change)


def test_sorting_a_few_layers_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts are sorted in parts; prompts as short as these tests' would never be."""
    generator = torch.Generator().manual_seed(3)
    score = torch.rand(5, 2, 48, generator=generator)
    priority = torch.randint(0, 3, (48,), generator=generator)
    lengths = torch.randint(0, 49, (5, 2), generator=generator)
    whole = select.keep_best(score, priority, lengths)
    monkeypatch.setattr(select, "SORT_ELEMENTS", 2 * score[0].numel())
    assert torch.equal(select.keep_best(score, priority, lengths), whole)
    assert torch.equal(whole.sum(-1), lengths)
