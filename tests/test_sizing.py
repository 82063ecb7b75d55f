"""`hybridkv plan`: its bytes are the engine's, its times a lower limit that follows from bytes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridkv_vllm.cli import main
from hybridkv_vllm.shapes import GB, GIB, GPUS, MODELS, Experts, ModelShape, Workload, read_shape
from hybridkv_vllm.sizing import estimate
from hybridkv_vllm.worker.host_tier import HostTier

SEVEN_B = MODELS["Qwen/Qwen2.5-VL-7B-Instruct"]
LONG = Workload(context=32768, answer=128)


BILLIONS = {
    "Qwen2.5-VL-3B": 3.75,
    "Qwen2.5-VL-7B": 8.29,
    "Qwen2.5-VL-32B": 33.45,
    "Qwen2.5-VL-72B": 73.4,
    "Qwen3-VL-4B": 4.44,
    "Qwen3-VL-8B": 8.77,
    "Qwen3-VL-32B": 33.36,
    "Qwen3-VL-30B-A3B": 31.07,
}


def test_shapes_have_the_parameters_of_their_models() -> None:
    """As Hugging Face counts the checkpoints."""
    assert {f"Qwen/{name}-Instruct" for name in BILLIONS} == set(MODELS)
    for name, billions in BILLIONS.items():
        assert MODELS[f"Qwen/{name}-Instruct"].parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_experts_are_read_as_tokens_take_them() -> None:
    """Of a mixture that is called A3B one token reads three billion parameters, many tokens all of them."""
    mixture = MODELS["Qwen/Qwen3-VL-30B-A3B-Instruct"]
    assert mixture.step_parameters(1) / 1e9 == pytest.approx(3.0, rel=0.02)
    read = [mixture.step_parameters(rows) for rows in (1, 2, 16, 512)]
    assert read == sorted(set(read))
    everything = mixture.parameters - mixture.vision - mixture.hidden * mixture.vocabulary
    assert read[-1] == pytest.approx(everything, rel=1e-6)
    assert SEVEN_B.step_parameters(1) == SEVEN_B.step_parameters(512)


def test_the_figures_that_can_be_done_by_hand() -> None:
    """Qwen2.5-VL-7B at 32k on an H200: 57,344 bytes a token, 62 requests, 30 ms."""
    result = estimate(SEVEN_B, GPUS["h200"], LONG)
    assert result.kv_bytes_per_token == 28 * 4 * 2 * 128 * 2 == 57344
    block = 16 * 57344
    memory = (int(0.92 * 139 * GIB) - 2 * SEVEN_B.parameters - 2 * GIB) // block
    assert result.stock.request_bytes == (2048 + 8) * block
    assert result.stock.requests == memory // (2048 + 8) == 62
    # A tenth of 2,048 blocks, rounded up, and 8 of the answer; one prompt is held beside all of them.
    assert result.hybridkv.request_bytes == (205 + 8) * block
    assert result.hybridkv.requests == (memory - 2048) // (205 + 8)
    assert result.hybridkv.host_bytes == 2048 * block
    step = (2 * SEVEN_B.step_parameters(62) + 62 * (32768 + 64) * 57344) / (0.9 * 4800 * GB)
    assert result.stock.step == pytest.approx(step)
    assert result.stock.tokens_per_second == pytest.approx(62 / step)


def test_what_each_choice_costs() -> None:
    card = GPUS["h200"]
    usual = estimate(SEVEN_B, card, LONG).hybridkv
    pruned = estimate(SEVEN_B, card, replace(LONG, tier="off")).hybridkv
    on_gpu = estimate(SEVEN_B, card, replace(LONG, tier="gpu"))
    whole = estimate(SEVEN_B, card, replace(LONG, budget=1.0))
    assert pruned.host_bytes == on_gpu.hybridkv.host_bytes == whole.hybridkv.host_bytes == 0
    assert pruned.requests == usual.requests > on_gpu.stock.requests > on_gpu.hybridkv.requests
    assert pruned.single < usual.single
    assert whole.recalling == 0
    # Fetching more takes longer, and only that.
    missing = estimate(SEVEN_B, card, replace(LONG, missed=0.06)).hybridkv
    assert missing.single - pruned.single == pytest.approx(2 * (usual.single - pruned.single))
    # A host pool for ten requests, and no more.
    pool = replace(LONG, host_memory=10 * usual.host_bytes + 1)
    assert estimate(SEVEN_B, card, pool).hybridkv.requests == 10
    half = estimate(SEVEN_B, card, replace(LONG, ranks=2))
    assert half.kv_bytes_per_token == 57344 // 2
    assert half.stock.single == pytest.approx(estimate(SEVEN_B, card, LONG).stock.single / 2)
    batch = estimate(SEVEN_B, card, replace(LONG, batch=32))
    assert batch.stock.batch == batch.hybridkv.batch == 32
    assert batch.hybridkv.requests == usual.requests


def test_small_budgets_let_some_heads_recall() -> None:
    """As many as the worker's own rule says: 7% of landmarks do not fit in 5% for all."""
    counts = [
        estimate(SEVEN_B, GPUS["h200"], replace(LONG, budget=budget)).recalling
        for budget in (0.02, 0.05, 0.1)
    ]
    assert 0 < counts[0] < counts[1] < counts[2] == 112


@pytest.mark.parametrize(
    ("context", "budget", "dynamic"),
    [(2048, 0.05, 1.0), (8200, 0.02, 0.5), (15000, 0.05, 1.0), (32768, 0.05, 0.75)],
)
def test_host_memory_is_what_the_worker_keeps(context: int, budget: float, dynamic: float) -> None:
    """Where some of the dynamic heads do not recall after all: which ones is left to chance here."""
    work = replace(LONG, context=context, budget=budget, dynamic=dynamic)
    result = estimate(SEVEN_B, GPUS["h200"], work)
    chunks, heads = context // 16, round(dynamic * 112)
    assert 0 < result.recalling < heads
    tier = HostTier(torch.empty(112 * chunks, 16, 2 * SEVEN_B.head_size, dtype=torch.bfloat16))
    reservation = tier.reserve(0, 112 * chunks)
    recalling = random.Random(0).sample(range(heads), result.recalling)
    tier.trim(reservation, (range(head * chunks, (head + 1) * chunks) for head in recalling))
    assert result.hybridkv.host_bytes == pytest.approx(tier.bytes_held, rel=0.1)


@pytest.mark.parametrize("requests", [1, 2, 3])
def test_recall_on_the_gpu_needs_no_room_for_another_prefill(requests: int) -> None:
    """Each request has its prompt's blocks and its arena, and grows by its answer only."""
    work = replace(LONG, tier="gpu", utilization=1.0, reserved=0)
    held = 2048 + 205 + 8
    block = SEVEN_B.layers * SEVEN_B.kv_heads * SEVEN_B.page_bytes()
    card = replace(GPUS["h200"], memory=requests * held * block + SEVEN_B.weight_bytes)
    assert estimate(SEVEN_B, card, work).hybridkv.requests == requests


def test_the_engine_decodes_as_many_at_once() -> None:
    """`benchmarks/concurrency.py` counted at the engine: memory for five prompts of 512 tokens and a bit."""
    measured = json.loads(
        (Path(__file__).parents[1] / "benchmarks" / "results" / "concurrency.json").read_text()
    )
    shape = ModelShape("tiny", 2, 64, 4, 2, 64, 128, 1000)
    settings = measured["settings"]
    blocks = settings["prompts_in_memory"] * (settings["prompt_tokens"] + 32) // 16
    block = 2 * 2 * shape.page_bytes()
    card = replace(GPUS["h200"], memory=blocks * block + shape.parameters * 2)
    work = Workload(settings["prompt_tokens"], settings["answer_tokens"], utilization=1.0, reserved=0)
    # The engine packs rows by what they hold now, between their first and their last tokens.
    least, most = work, replace(work, answer=1)
    for budget in settings["budgets"]:
        counted = measured["decoding_at_once"][f"{budget:g}"]
        ends = [
            estimate(shape, card, replace(ends, budget=budget, tier="off")).hybridkv for ends in (least, most)
        ]
        assert ends[0].requests <= counted <= ends[1].requests
    stock = [estimate(shape, card, ends).stock.requests for ends in (least, most)]
    assert stock[0] <= measured["decoding_at_once"]["stock"] <= stock[1]


def test_a_local_model_is_read_from_its_config(tiny_model: Path, tmp_path: Path) -> None:
    shape = read_shape(tiny_model)
    text = json.loads((tiny_model / "config.json").read_text())["text_config"]
    assert (shape.layers, shape.kv_heads) == (text["num_hidden_layers"], text["num_key_value_heads"])
    assert shape.head_size == 64
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="says nothing of 'num_attention_heads'"):
        read_shape(tmp_path)


def test_a_float32_checkpoint_is_served_in_16_bits(tmp_path: Path) -> None:
    """By vLLM, unless it is told otherwise."""
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, "dtype": "float32"}))
    assert read_shape(tmp_path).itemsize == 2


COMMON = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 1000,
}
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("more", "experts"),
    [
        ({}, None),
        ({"num_experts": 0}, None),
        # As Mixtral, Qwen3-MoE, Qwen2-MoE and GLM-4-MoE say it.
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, Experts(8, 2, 256)),
        (
            {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [3]},
            Experts(8, 2, 32, dense_layers=1),
        ),
        (
            {
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 96,
                "decoder_sparse_step": 3,
            },
            Experts(8, 2, 32, shared=96, dense_layers=3),
        ),
        (
            {
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "n_shared_experts": 2,
                "first_k_dense_replace": 1,
            },
            Experts(8, 2, 32, shared=64, dense_layers=1),
        ),
    ],
)
def test_experts_are_found_under_their_names(
    more: dict[str, Any], experts: Experts | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, **more}))
    assert read_shape(tmp_path).experts == experts


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"sliding_window": 4096}, "sliding windows"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"num_experts": [64, 64]}, "experts of several kinds"),
        ({"num_experts": 8}, "says nothing of 'num_experts_per_tok'"),
        ({"num_experts": "8"}, "json: num_experts must be a whole number above 0, got '8'"),
        ({"num_attention_heads": 0}, "json: num_attention_heads must be a whole number above 0, got 0"),
        ({"num_key_value_heads": "8"}, "json: num_key_value_heads must be a whole number above 0, got '8'"),
        ({"head_dim": -1}, "json: head_dim must be a whole number above 0, got -1"),
        ({"hidden_size": None}, "hidden_size must be a whole number above 0, got None"),
        ({"layer_types": 5}, "json: layer_types must be a list of str, got 5"),
        ({"layer_types": [["a"]]}, r"json: layer_types must be a list of str, got \[\['a'\]\]"),
        ({**EIGHT, "mlp_only_layers": 3}, "json: mlp_only_layers must be a list of int, got 3"),
        (
            {**EIGHT, "n_shared_experts": "2"},
            "json: n_shared_experts must be a whole number above 0, got '2'",
        ),
    ],
)
def test_a_model_whose_numbers_would_be_wrong_is_refused(
    more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """What the server refuses as well, and weights that cannot be counted."""
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {**COMMON, **more}}))
    with pytest.raises(ValueError, match=says):
        read_shape(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", '"text"'])
def test_a_config_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is no JSON object"):
        read_shape(tmp_path)


@pytest.mark.parametrize("name", ["text_config", "llm_config"])
def test_a_part_that_is_no_object_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({name: 5}))
    with pytest.raises(ValueError, match=rf"config\.json: {name} must be a JSON object, got 5"):
        read_shape(tmp_path)


def test_a_config_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ValueError, match=r"config\.json cannot be read: "):
        read_shape(tmp_path)


def test_without_a_number_of_kv_heads_each_query_head_has_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, "num_key_value_heads": None}))
    assert read_shape(tmp_path).kv_heads == COMMON["num_attention_heads"]


def test_a_window_that_is_switched_off_is_none(tmp_path: Path) -> None:
    """As published Qwen2.5-VL configurations have it."""
    switched_off = {**COMMON, "use_sliding_window": False, "sliding_window": 32768}
    (tmp_path / "config.json").write_text(json.dumps(switched_off))
    assert read_shape(tmp_path).layers == 4


def test_the_command(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    usual = ["plan", "--gpu", "h200", "--context", "32k", "--answer", "128"]
    assert main([*usual, "--model", SEVEN_B.name]) == 0
    shown = capsys.readouterr().out
    assert "requests at once" in shown
    assert "Assumed:" in shown
    assert main([*usual, "--model", SEVEN_B.name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stock"]["requests"] == 62
    assert main([*usual, "--model", str(tiny_model)]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "/nowhere"], "is no local folder, and none of Qwen/"),
        (["--model", SEVEN_B.name, "--budget", "0"], "budget must be above 0"),
        (["--model", SEVEN_B.name, "--context", "3"], "context must be at least 16"),
        (["--model", SEVEN_B.name, "--missed", "2"], "missed must be in [0, 1]"),
        (["--model", SEVEN_B.name, "--batch", "0"], "batch must be at least 1"),
        (["--model", "Qwen/Qwen2.5-VL-72B-Instruct"], "use more ranks"),
        (["--model", SEVEN_B.name, "--gpu", "tpu"], "--gpu tpu is none of"),
        (["--model", SEVEN_B.name, "--host-pool-gib", "inf"], "--host-pool-gib must be a number above 0"),
        (["--model", SEVEN_B.name, "--host-pool-gib", "1e308"], "above 0 and at most 1e+09, got 1e+308"),
        (["--model", "a" * 300], "is no local folder, and none of Qwen/"),
        (["--model", SEVEN_B.name, "--host-pool-gib", "-1"], "--host-pool-gib must be a number above 0"),
        # vLLM divides neither 28 query heads among 3 ranks, nor 4 KV heads among 7.
        (["--model", SEVEN_B.name, "--tensor-parallel-size", "3"], "cannot be divided among 3 ranks"),
        (["--model", SEVEN_B.name, "--tensor-parallel-size", "7"], "cannot be divided among 7 ranks"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["plan", "--gpu", "h100", "--context", "32k"]
    assert main([*usual, *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ("1e5", "'1e5': write a whole number, such as 32768 or 32k"),
        ("k", "'k': write a whole number, such as 32768 or 32k"),
        ("99999999999999999999k", "'99999999999999999999k': must be at most 1073741824"),
    ],
)
@pytest.mark.parametrize("option", ["--context", "--answer"])
def test_a_number_of_tokens_that_is_none_is_refused(
    option: str, tokens: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", SEVEN_B.name, "--gpu", "h100", "--context", "32k", option, tokens])
    assert ended.value.code == 2
    assert f"argument {option}: {says}" in capsys.readouterr().err


def test_the_longest_prompt_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    most = ["--context", "1048576k", "--answer", "1048576k", "--host-pool-gib", "1e9"]
    assert main(["plan", "--model", SEVEN_B.name, "--gpu", "h100", *most]) == 0
    assert "requests at once" in capsys.readouterr().out


def test_the_name_of_a_folder_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "m [b]:smile: [" / "b]x"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(COMMON))
    assert main(["plan", "--model", str(folder), "--gpu", "h100", "--context", "32k"]) == 0
    assert "m [b]:smile: [/b]x on h100" in " ".join(capsys.readouterr().out.split())
