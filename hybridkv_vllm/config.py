"""Server and request options: their names, defaults, ranges and error texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hybridkv_kernels.recall.layout import LandmarkKind
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hybridkv_vllm.errors import HybridKVConfigError
from hybridkv_vllm.plan import Tier
from hybridkv_vllm.policies import POLICIES, PROFILE, PolicyOptions, StaticWeight

if TYPE_CHECKING:
    from vllm.config import VllmConfig

REQUEST_PREFIX = "hybridkv_"
# What kernels count with.
LARGEST = 2**31 - 1


class ServerOptions(BaseModel):
    """Options of the server, each given as `--additional-config.hybridkv.NAME VALUE`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float = Field(
        default=0.10,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Share of a prompt's KV cache that stays on the GPU.",
    )
    policy: str = Field(default="hybridkv", description="Method that chooses what stays.")
    classifier: Literal["text_mass", "sparsity", "top_mass", "union"] = Field(
        default="text_mass", description="Figure by which a KV head is called static or dynamic."
    )
    profile: Path | None = Field(
        default=None,
        description="File of `hybridkv calibrate`: what it says of a KV head takes the classifier's place.",
    )
    theta: float = Field(
        default=0.9,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="A head is static where its figure is at least this.",
    )
    dynamic_share: float = Field(
        default=0.4,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Coefficient r: what dynamic heads get of an equal share of the budget.",
    )
    static_weight: StaticWeight = Field(
        default="dense",
        description="By what static heads share their part of the budget: `dense`, the less sparse get more; "
        "`sparse`, the more sparse; `even`, all alike.",
    )
    landmark: LandmarkKind = Field(
        default="sketch2", description="What the GPU keeps of a dynamic head's chunk to score it."
    )
    dynamic_tier: Tier = Field(
        default="host",
        description="Where a dynamic head's chunks live: in host memory, or in the prompt's own blocks "
        "on the GPU, which are then not given back; `off` prunes every head.",
    )
    host_pool_gib: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Pinned host memory for the chunks of dynamic heads, GiB a rank; by default the ranks "
        "of a node share a quarter of its memory, and none takes more than its KV cache / budget.",
    )
    recall_interval: int = Field(
        default=1, ge=1, le=LARGEST, description="Decode steps between two chunk selections."
    )
    pin_first_chunks: int = Field(
        default=0,
        ge=0,
        le=LARGEST,
        description="First chunks that are always selected, as far as a head's hot slots go.",
    )
    pin_recent_chunks: int = Field(
        default=0,
        ge=0,
        le=LARGEST,
        description="Last prompt chunks that are always selected, as far as the slots go.",
    )
    window: int = Field(
        default=64,
        ge=2,
        le=256,
        description="Longest observation window: prompt queries whose attention decides.",
    )
    min_prompt_tokens: int = Field(default=1024, ge=1, description="Shorter prompts stay uncompressed.")
    kernels: Literal["auto", "triton", "torch"] = Field(
        default="auto", description="Kernel implementation; `auto` is Triton on a GPU, torch elsewhere."
    )

    def policy_options(self) -> PolicyOptions:
        """The part that policies see."""
        return PolicyOptions(
            classifier=self.classifier if self.profile is None else PROFILE,
            theta=self.theta,
            dynamic_share=self.dynamic_share,
            static_weight=self.static_weight,
        )

    @property
    def budget_share(self) -> float:
        """The budget that the policy really uses (`full` keeps everything)."""
        return POLICIES[self.policy].budget_share(self.budget)

    @property
    def recall_tier(self) -> Tier:
        """The tier that dynamic heads recall from; `off` where the policy prunes them."""
        return self.dynamic_tier if POLICIES[self.policy].recalls else "off"

    @property
    def classifier_name(self) -> str:
        """The classifier in use: the policy's own, where it defines one."""
        return POLICIES[self.policy].classifier or self.policy_options().classifier

    @property
    def landmark_kind(self) -> LandmarkKind:
        """The landmark kind in use: the policy's own, where it defines one."""
        return POLICIES[self.policy].landmark or self.landmark


class RequestOptions(BaseModel):
    """Options of one request, given in the OpenAI body as `vllm_xargs`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hybridkv_budget: float | None = Field(
        default=None, gt=0, le=1, allow_inf_nan=False, description="Takes the place of the server's budget."
    )
    hybridkv_enabled: bool = Field(default=True, description="False leaves this prompt uncompressed.")
    hybridkv_report: bool = Field(
        default=False,
        description="The answer, if it is neither streamed nor ended by a `stop` string, says what became of "
        "the prompt, as `kv_transfer_params.hybridkv`.",
    )


def _one_line(error: ValidationError, known: Mapping[str, Any]) -> str:
    """Says in one line what is wrong with each option and what would be right."""
    parts = []
    for detail in error.errors():
        name = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            parts.append(f"unknown option '{name}' (known: {', '.join(sorted(known))})")
        else:
            reason = detail["msg"][0].lower() + detail["msg"][1:]
            parts.append(f"option '{name}' is {detail['input']!r}: {reason}")
    return "; ".join(parts)


def parse_server_options(raw: object) -> ServerOptions:
    """Validates the `hybridkv` entry of `--additional-config`.

    Raises:
        HybridKVConfigError: unknown name or value out of range; one line that says what would be right.
    """
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise HybridKVConfigError(
            f"--additional-config.hybridkv must hold named options, got {raw!r}; "
            "write for example --additional-config.hybridkv.budget 0.1"
        )
    try:
        options = ServerOptions.model_validate(dict(raw))
    except ValidationError as error:
        remedy = "correct --additional-config.hybridkv"
        raise HybridKVConfigError(f"{_one_line(error, ServerOptions.model_fields)}; {remedy}") from None
    if options.policy not in POLICIES:
        raise HybridKVConfigError(
            f"option 'policy' is {options.policy!r}: choose one of {', '.join(sorted(POLICIES))}"
        )
    return options


def server_options(vllm_config: VllmConfig) -> ServerOptions:
    """The options that a vLLM configuration carries.

    Raises:
        HybridKVConfigError: see `parse_server_options`.
    """
    additional = vllm_config.additional_config
    return parse_server_options(additional.get("hybridkv") if isinstance(additional, Mapping) else None)


def parse_request_options(extra_args: Mapping[str, Any] | None) -> RequestOptions:
    """Validates the `hybridkv_*` entries of a request's `vllm_xargs`; others are not ours.

    Raises:
        ValueError: unknown name or value out of range, in one line.
    """
    ours = {name: value for name, value in (extra_args or {}).items() if name.startswith(REQUEST_PREFIX)}
    if not ours:
        return RequestOptions()
    try:
        return RequestOptions.model_validate(ours)
    except ValidationError as error:
        raise ValueError(f"vllm_xargs: {_one_line(error, RequestOptions.model_fields)}") from None
