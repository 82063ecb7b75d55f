"""Options: defaults, ranges, and errors that name the option and the remedy in one line."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hybridkv_kernels.window_scores import MAX_WINDOW

from hybridkv_vllm.config import ServerOptions, parse_request_options, parse_server_options
from hybridkv_vllm.errors import HybridKVConfigError
from hybridkv_vllm.policies import PolicyOptions


def test_the_names_and_defaults_that_users_were_promised() -> None:
    assert ServerOptions().model_dump() == {
        "budget": 0.10,
        "policy": "hybridkv",
        "classifier": "text_mass",
        "profile": None,
        "theta": 0.9,
        "dynamic_share": 0.4,
        "static_weight": "dense",
        "landmark": "sketch2",
        "dynamic_tier": "host",
        "host_pool_gib": None,
        "recall_interval": 1,
        "pin_first_chunks": 0,
        "pin_recent_chunks": 0,
        "window": 64,
        "min_prompt_tokens": 1024,
        "kernels": "auto",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget", 0),
        ("budget", -1),
        ("budget", 1.5),
        ("budget", "abc"),
        ("budget", math.nan),
        ("budget", "nan"),
        ("budget", math.inf),
        ("theta", 2),
        ("dynamic_share", -0.1),
        ("window", 1),
        ("min_prompt_tokens", 0),
        ("recall_interval", 0),
        ("recall_interval", 2**31),
        ("kernels", "cuda"),
        ("classifier", "guess"),
        ("policy", "nobody"),
        ("dynamic_tier", "disk"),
        ("landmark", "none"),
        ("host_pool_gib", 0),
        ("host_pool_gib", math.inf),
        ("pin_first_chunks", -1),
        ("pin_recent_chunks", 2**63),
        ("pin_recent_chunks", -1),
        ("pin_recent_chunks", 0.5),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(HybridKVConfigError) as error:
        parse_server_options({name: value})
    message = str(error.value)
    assert message.startswith("hybridkv: ")
    assert f"'{name}'" in message
    assert "\n" not in message


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(HybridKVConfigError, match=r"unknown option 'bugdet' .*budget"):
        parse_server_options({"bugdet": 0.1})


def test_options_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(HybridKVConfigError, match="named options"):
        parse_server_options(0.1)


def test_text_from_the_command_line_is_understood() -> None:
    assert parse_server_options({"budget": "0.25"}).budget == 0.25
    assert parse_server_options(None) == ServerOptions()


def test_full_keeps_everything_whatever_budget_is_asked() -> None:
    assert parse_server_options({"policy": "full", "budget": 0.1}).budget_share == 1.0
    assert parse_server_options({"policy": "snapkv", "budget": 0.1}).budget_share == 0.1


def test_policies_see_what_the_server_was_told() -> None:
    options = parse_server_options(
        {"classifier": "union", "theta": 0.5, "dynamic_share": 0.7, "static_weight": "sparse"}
    )
    assert options.policy_options() == PolicyOptions(
        classifier="union", theta=0.5, dynamic_share=0.7, static_weight="sparse"
    )


@pytest.mark.parametrize("tier", ["host", "gpu", "off"])
@pytest.mark.parametrize(
    ("policy", "recalls"), [("hybridkv", True), ("quest", True), ("snapkv", False), ("full", False)]
)
def test_only_policies_whose_heads_recall_need_a_tier(policy: str, recalls: bool, tier: str) -> None:
    options = parse_server_options({"policy": policy, "dynamic_tier": tier})
    assert options.recall_tier == (tier if recalls else "off")


@pytest.mark.parametrize("landmark", ["sketch", "sketch2", "mean", "minmax"])
def test_the_landmark_is_the_options_unless_the_method_defines_it(landmark: str) -> None:
    assert parse_server_options({"landmark": landmark}).landmark_kind == landmark
    assert parse_server_options({"policy": "quest", "landmark": landmark}).landmark_kind == "minmax"


@pytest.mark.parametrize("value", [0, -1, 1.5, "abc", "nan", math.inf, [0.1]])
def test_a_bad_request_budget_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="hybridkv_budget"):
        parse_request_options({"hybridkv_budget": value})


def test_request_options() -> None:
    assert parse_request_options(None).hybridkv_enabled
    assert parse_request_options({"other": 1}).hybridkv_budget is None
    assert parse_request_options({"hybridkv_budget": 0.2}).hybridkv_budget == 0.2
    assert not parse_request_options({"hybridkv_enabled": 0}).hybridkv_enabled
    assert not parse_request_options({"hybridkv_enabled": "false"}).hybridkv_enabled
    with pytest.raises(ValueError, match="hybridkv_enabled"):
        parse_request_options({"hybridkv_enabled": 7})
    with pytest.raises(ValueError, match=r"unknown option 'hybridkv_bugdet' .*hybridkv_budget"):
        parse_request_options({"hybridkv_bugdet": 0.2})


def test_the_longest_window_is_what_the_kernel_takes() -> None:
    assert parse_server_options({"window": MAX_WINDOW}).window == MAX_WINDOW
    with pytest.raises(HybridKVConfigError, match=f"less than or equal to {MAX_WINDOW}"):
        parse_server_options({"window": MAX_WINDOW + 1})
