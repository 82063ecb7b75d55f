"""Entry point `vllm.general_plugins`: registers HybridKV and holds the only patches of vLLM.

Each patch says why no hook would do; all were read in vLLM 0.32.0 and 0.33.0. Official hooks are used
for all else: the attention-backend registry, the KV cache spec registry, the scheduler class, `ModelState`,
endpoint plugins.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hybridkv_vllm.config import parse_request_options
from hybridkv_vllm.errors import HybridKVConfigError
from hybridkv_vllm.observe.metrics import prepare_directory
from hybridkv_vllm.startup import configure, is_selected

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BACKEND_NAME = "HYBRIDKV"
BACKEND_PATH = "hybridkv_vllm.attention.backend.HybridKVBackend"


@functools.cache
def register() -> None:
    """Called by vLLM in every process: API server, engine core, workers."""
    # First: what follows may refuse.
    _report_refusals_in_one_line()
    prepare_directory()
    _register_backend()
    _register_spec()
    _patch_config_check()
    _patch_cpu_selector()
    _patch_request_check()


def _register_backend() -> None:
    """Makes `--attention-backend hybridkv` a known name.

    The configuration travels to the engine core pickled, and is unpickled there before plugins load: a
    member added by name would not be known yet. So the name is an alias of the member CUSTOM, which the
    registry keeps for plugins. (vLLM upper-cases the flag's value.)
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    AttentionBackendEnum._member_map_[BACKEND_NAME] = AttentionBackendEnum.CUSTOM


def _register_spec() -> None:
    """Ties our KV cache spec to our block manager."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from hybridkv_vllm.scheduling.manager import HybridKVManager
    from hybridkv_vllm.scheduling.spec import HybridKVSpec

    # vLLM registers its own specs only into an empty registry: they must come first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(HybridKVSpec, HybridKVManager, FullAttentionSpec)


def _patch_config_check() -> None:
    """Runs `configure` at the end of the platform's own check of the whole configuration.

    Plugins get no look at the configuration; the platform's check is the last to change async scheduling
    and block size, on which ours depends.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.check_and_update_config

    @functools.wraps(original)
    def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
        del cls
        original(vllm_config)
        configure(vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)


def _patch_cpu_selector() -> None:
    """Lets a CPU-only server use the backend: vLLM's CPU platform ignores the flag."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not current_platform.is_cpu():
        return
    platform = type(current_platform)
    original = platform.get_attn_backend_cls

    @functools.wraps(original)
    def get_attn_backend_cls(cls: type, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        del cls
        if selected_backend is AttentionBackendEnum.CUSTOM:
            return selected_backend.get_path()
        return original(selected_backend, *args, **kwargs)

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _patch_request_check() -> None:
    """Rejects bad `vllm_xargs` in the API process: HTTP 400 before the engine sees the request.

    vLLM validates its own parameters in `_validate_params` and offers plugins no hook but a logits
    processor, which would cost every sampling step. `AsyncLLM.generate` gets there only once its first
    output is awaited, when a streamed answer has sent its status 200; so its call is checked too. The
    Responses API calls even that only once its stream is read (see `_install_server_hooks`). Without a server
    it is `LLMEngine.add_request` that is given the rendered prompt.
    """
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    validate, generate, create = InputProcessor._validate_params, AsyncLLM.generate, AsyncLLM.__init__
    add_request = LLMEngine.add_request

    @functools.wraps(validate)
    def checked_validate(self: InputProcessor, params: Any, *args: Any, **kwargs: Any) -> Any:
        _check_options(self.vllm_config, params)
        return validate(self, params, *args, **kwargs)

    @functools.wraps(generate)
    def checked_generate(self: AsyncLLM, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        _check_request(self, prompt, sampling_params)
        return generate(self, prompt, sampling_params, *args, **kwargs)

    @functools.wraps(create)
    def checked_create(self: AsyncLLM, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        if kwargs.get("usage_context") is UsageContext.OPENAI_API_SERVER:
            _install_server_hooks()

    @functools.wraps(add_request)
    def checked_add_request(
        self: LLMEngine, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> str:
        _check_request(self, prompt, params)
        return add_request(self, request_id, prompt, params, *args, **kwargs)

    InputProcessor._validate_params = checked_validate
    AsyncLLM.generate = checked_generate
    AsyncLLM.__init__ = checked_create
    LLMEngine.add_request = checked_add_request


def _check_options(vllm_config: VllmConfig, params: Any) -> None:
    """Raises vLLM's own error, HTTP 400, where `vllm_xargs` hold a bad option of ours."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    if isinstance(params, SamplingParams) and is_selected(vllm_config):
        try:
            parse_request_options(params.extra_args)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def _check_request(engine: Any, prompt: Any, params: Any) -> None:
    """The same check of a rendered prompt; the API process forgets the new pictures of one that is refused.

    Its cache believes by now that the engine has them: the next request with such a picture would send none,
    and be answered with HTTP 500 (read in vLLM 0.32, `MultiModalCacheMissError`). A picture without data is
    one that the engine has from an earlier request: both caches keep it, and what they drop stays the same.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        _check_options(engine.vllm_config, params)
    except VLLMValidationError:
        cache = engine.renderer.mm_processor_cache
        if cache is not None and isinstance(prompt, Mapping):
            items_of = prompt.get("mm_kwargs") or {}
            for modality, hashes in (prompt.get("mm_hashes") or {}).items():
                for mm_hash, item in zip(hashes, items_of[modality], strict=True):
                    if item is not None:
                        cache.invalidate(mm_hash)
        raise


@functools.cache
def _install_server_hooks() -> None:
    """Checks options where the Responses API builds its stream, before it has sent a status.

    Not in `register`: the API server's modules must not be imported in other processes.
    """
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    generate = OpenAIServingResponses._generate_with_builtin_tools

    @functools.wraps(generate)
    def checked(
        self: Any, request_id: str, engine_input: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _check_request(self.engine_client, engine_input, sampling_params)
        return generate(self, request_id, engine_input, sampling_params, *args, **kwargs)

    OpenAIServingResponses._generate_with_builtin_tools = checked


def _report_refusals_in_one_line() -> None:
    """A refusal to start prints its one line, not a traceback above it."""
    original = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, HybridKVConfigError):
            print(error, file=sys.stderr)
        else:
            original(kind, error, traceback)

    sys.excepthook = excepthook


@functools.cache
def install_worker_hooks() -> None:
    """The patches of the model runner; called when a worker builds its first layer.

    Not in `register`: the runner's modules must not be imported in the API server, and on a CPU not
    before vLLM's CPU worker has prepared torch for them.
    """
    import vllm.v1.worker.gpu.model_runner as model_runner
    import vllm.v1.worker.gpu.model_states as model_states
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from hybridkv_vllm.scheduling.scheduler import GRANTS_ATTRIBUTE
    from hybridkv_vllm.worker.state import HybridKVModelState

    resolve = model_states.resolve_model_state_cls

    @functools.wraps(resolve)
    def resolve_model_state_cls(vllm_config: VllmConfig, model: Any) -> type:
        """The state class is chosen by the model; no backend or plugin is asked."""
        state_cls = resolve(vllm_config, model)
        if not is_selected(vllm_config):
            return state_cls
        if state_cls is not DefaultModelState:
            raise HybridKVConfigError(
                f"the model brings its own state ({state_cls.__name__}); serve it with another "
                "--attention-backend"
            )
        return HybridKVModelState

    model_states.resolve_model_state_cls = resolve_model_state_cls

    update_requests = model_runner.GPUModelRunner.update_requests

    @functools.wraps(update_requests)
    def update_requests_and_grants(self: Any, scheduler_output: Any) -> None:
        """Arenas travel on the scheduler's output, which no `ModelState` hook is given."""
        update_requests(self, scheduler_output)
        grants = getattr(scheduler_output, GRANTS_ATTRIBUTE, None)
        if grants:
            self.model_state.accept_grants(grants)

    model_runner.GPUModelRunner.update_requests = update_requests_and_grants
