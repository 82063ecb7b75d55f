"""Methods that choose what stays of a prompt's KV cache: pure torch, without vLLM."""

from hybridkv_vllm.policies.base import Policy
from hybridkv_vllm.policies.budget import recall_limits
from hybridkv_vllm.policies.classify import CLASSIFIERS, PROFILE
from hybridkv_vllm.policies.data import PolicyOptions, PromptScores, Recall, Selection, StaticWeight, Verdict
from hybridkv_vllm.policies.registry import POLICIES, get_policy

__all__ = [
    "CLASSIFIERS",
    "POLICIES",
    "PROFILE",
    "Policy",
    "PolicyOptions",
    "PromptScores",
    "Recall",
    "Selection",
    "StaticWeight",
    "Verdict",
    "get_policy",
    "recall_limits",
]
