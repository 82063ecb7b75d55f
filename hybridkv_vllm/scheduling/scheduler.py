"""The scheduler hook: plans each prompt, keeps its window in one chunk, sends arenas to the workers."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from hybridkv_vllm.config import parse_request_options, server_options
from hybridkv_vllm.observe.metrics import FallbackReason, engine_metrics
from hybridkv_vllm.plan import PAGE_TOKENS, PromptPlan, Span, ceil_pages, make_plan
from hybridkv_vllm.policies import get_policy
from hybridkv_vllm.scheduling.manager import HybridKVManager

# vLLM configures loggers below its own name only.
logger = init_logger(f"vllm.{__name__}")

# Name of the attribute that carries a step's arenas on vLLM's SchedulerOutput to the workers.
GRANTS_ATTRIBUTE = "hybridkv_grants"


def visual_spans(request: Request) -> tuple[Span, ...]:
    """`(start, end)` of the tokens that stand for pictures, video or sound, end exclusive, ascending."""
    spans = [
        (start, last + 1)
        for feature in request.mm_features
        if feature.modality != "prompt_embeds"
        for start, last in feature.mm_position.extract_embeds_range()
    ]
    return tuple(sorted(spans))


class HybridKVScheduler(Scheduler):
    """vLLM's scheduler plus plans, arenas and early returns (hooks read in 0.32.0 and 0.33.0)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hybridkv_options = server_options(self.vllm_config)
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        if not isinstance(manager, HybridKVManager):
            raise RuntimeError(f"hybridkv: expected its own block manager, found {type(manager).__name__}")
        self.hybridkv_manager = manager
        self.hybridkv_metrics = engine_metrics()
        self._ending_tokens = 0
        # LoRA adapters of the first so many running requests, counted once a step.
        self._running_adapters: set[int] = set()
        self._num_counted = 0
        # Requests whose answer says what became of their prompt; of a preempted one what it would have said:
        # the token of a step under way may still end it.
        self._reports: dict[str, dict[str, Any] | None] = {}

    def add_request(self, request: Request) -> None:
        """Decides, when a request arrives, whether and how its prompt will be compressed."""
        if request.request_id not in self.requests:
            plan = self._plan(request)
            if plan is not None:
                self.hybridkv_manager.add_plan(request.request_id, plan)
        super().add_request(request)

    def _plan(self, request: Request) -> PromptPlan | None:
        options = self.hybridkv_options
        params = request.sampling_params
        if params is None:
            return None
        try:
            wanted = parse_request_options(params.extra_args)
        except ValueError as error:
            # The API process rejects these; a front end without our check must not bring the engine down.
            self._fall_back("bad_request_options", str(error))
            return None
        if wanted.hybridkv_report:
            self._reports[request.request_id] = None
        num_tokens = request.num_prompt_tokens
        if not wanted.hybridkv_enabled or num_tokens < max(options.min_prompt_tokens, PAGE_TOKENS):
            return None
        if request.resumable:
            self._fall_back("streaming_input", "a session's prompt grows; it stays uncompressed")
            return None
        policy, spans = get_policy(options.policy), visual_spans(request)
        budget = policy.budget_share(wanted.hybridkv_budget or options.budget)
        recalls = policy.may_recall(bool(spans), options.policy_options())
        tier = options.recall_tier if recalls else "off"
        plan = make_plan(num_tokens, spans, budget, options.window, tier)
        longest = min(num_tokens + (params.max_tokens or 0), self.max_model_len)
        if ceil_pages(longest) + plan.arena_size > self.hybridkv_manager.num_usable_blocks():
            self._fall_back(
                "pool_too_small",
                "prompt, longest answer and arena together exceed the KV cache; give the request a smaller "
                "max_tokens or hybridkv_budget, or the server more KV memory",
            )
            return None
        return plan

    def _fall_back(self, reason: FallbackReason, remedy: str) -> None:
        self.hybridkv_metrics.fallback(reason)
        logger.warning_once("hybridkv: request left uncompressed (%s): %s", reason, remedy)

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """Caps prefix hits so that the whole observation window is computed in this request."""
        blocks, num_local, boundary, diverged = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        plan = self.hybridkv_manager.plans.get(request.request_id)
        if plan is not None:
            longest_hit = plan.last_chunk_start // PAGE_TOKENS * PAGE_TOKENS
            if num_local > longest_hit:
                num_local = longest_hit
                blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_local)
        return blocks, num_local, boundary, diverged

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Keeps a chunk from ending inside the window, or from running past the prompt on a resume.

        vLLM calls this hook for every chunk it is about to schedule; its own use is speculative decoding,
        which HybridKV refuses.
        """
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        plan = self.hybridkv_manager.plans.get(request.request_id)
        if plan is None:
            return num_new_tokens
        length = plan.clip_chunk(num_computed_tokens, num_new_tokens)
        if num_computed_tokens < plan.num_tokens == num_computed_tokens + length:
            # The scores of all prompts that end in a step are held together: at most a longest prompt's.
            if self._ending_tokens and self._ending_tokens + plan.num_tokens > self.max_model_len:
                return max(0, plan.last_chunk_start - num_computed_tokens)
            self._ending_tokens += plan.num_tokens
        return length

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """As in vLLM; a request also waits whose LoRA adapter is one too many beside those of all that run.

        vLLM 0.32 counts the adapters of requests in this step. One whose chunk was clipped to nothing comes
        with a later step, as does one in flight on pipeline ranks, and vLLM asserts that there is room. 0.33
        counts all that run by itself.
        """
        if self.lora_config and request.lora_request:
            # Those that run only become more by now, until the next step.
            for other in self.running[self._num_counted :]:
                if other.lora_request:
                    self._running_adapters.add(other.lora_request.lora_int_id)
            self._num_counted = len(self.running)
            is_new = request.lora_request.lora_int_id not in self._running_adapters
            if is_new and len(self._running_adapters) >= self.lora_config.max_loras:
                return False
        return super()._handle_blocked_waiting_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """As in vLLM; the arenas reserved in this step travel with its output."""
        self._ending_tokens = 0
        self._running_adapters.clear()
        self._num_counted = 0
        output = super().schedule(*args, **kwargs)
        grants = self.hybridkv_manager.take_grants()
        if grants:
            setattr(output, GRANTS_ATTRIBUTE, grants)
        return output

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """As in vLLM; blocks of a chunk that will not run after all leave the prefix cache before they go.

        By priority a request can be preempted in the step that has scheduled it. vLLM (0.32, 0.33) has
        registered the chunk's blocks by then, and whoever hits them reads what lay there before.
        """
        blocks = self.hybridkv_manager.req_to_blocks.get(request.request_id, ())
        if request.request_id in self._reports:
            self._reports[request.request_id] = self._describe(request)
        not_computed = blocks[request.num_computed_tokens // PAGE_TOKENS :]
        self.kv_cache_manager.evict_blocks({block.block_id for block in not_computed})
        super()._preempt_request(request, *args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As in vLLM; then the prompt blocks of the step just processed go back to the pool."""
        manager = self.hybridkv_manager
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for grant in getattr(scheduler_output, GRANTS_ATTRIBUTE, ()):
            blocks_freed = 0
            request = self.requests.get(grant.request_id)
            # One that ended or was preempted meanwhile has given back everything, but was compressed.
            if request is not None and grant.request_id in manager.arenas:
                processed = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
                self.kv_cache_manager.remove_skipped_blocks(grant.request_id, processed)
                if manager.is_released(grant.request_id):
                    blocks_freed = grant.plan.num_full_blocks
            self.hybridkv_metrics.compressed(grant.plan, blocks_freed)
        self.hybridkv_metrics.set_blocks(arena=manager.num_arena_blocks, replaced=manager.num_replaced_blocks)
        return outputs

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        """As in vLLM; what it returns for the answer's `kv_transfer_params` also tells of the compression.

        That field is for connectors, which HybridKV refuses, and the one way from here into an answer.
        """
        report = self._report(request)
        kv_params, ec_params = super()._free_request(request, delay_free_blocks)
        self.hybridkv_manager.drop_plan(request.request_id)
        return (kv_params if report is None else {**(kv_params or {}), "hybridkv": report}), ec_params

    def _report(self, request: Request) -> dict[str, Any] | None:
        """What became of a finished request's prompt, if it asked; to be called before its blocks go."""
        if request.request_id not in self._reports:
            return None
        before = self._reports.pop(request.request_id)
        has_arena = request.request_id in self.hybridkv_manager.arenas
        return self._describe(request) if before is None or has_arena else before

    def _describe(self, request: Request) -> dict[str, Any]:
        """What has become of a request's prompt so far."""
        manager, num_tokens = self.hybridkv_manager, request.num_prompt_tokens
        plan = manager.plans.get(request.request_id)
        if plan is None or request.request_id not in manager.arenas:
            return {"compressed": False, "prompt_tokens": num_tokens}
        kept = min(num_tokens, plan.arena_size * PAGE_TOKENS + num_tokens % PAGE_TOKENS)
        return {
            "compressed": True,
            "prompt_tokens": num_tokens,
            "memory_share": round(kept / num_tokens, 4),
            "arena_blocks": plan.arena_size,
            "blocks_freed": plan.num_full_blocks if manager.is_released(request.request_id) else 0,
        }


class HybridKVAsyncScheduler(HybridKVScheduler, AsyncScheduler):
    """The same over vLLM's asynchronous scheduler, which it requires for async scheduling."""
