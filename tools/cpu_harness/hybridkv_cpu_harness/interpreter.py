"""Triton's interpreter, fit to serve: vLLM's small kernels were most of a step (read in Triton 3.9)."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any


def adapt(interpreter: ModuleType) -> None:
    """Changes `triton.runtime.interpreter`, right after its import."""
    _take_wide_masks(interpreter.InterpreterBuilder)
    _leave_out_overflow_checks(interpreter.interpreter_builder)
    core = interpreter.tl.core
    core._unwrap_if_constexpr = _unwrap_by_type(core)
    _share_shapes(core)
    interpreter._patch_attr = _call_at_once(interpreter)
    interpreter._patch_lang_core = _count_in_scalars(interpreter._patch_lang_core, interpreter.tl)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    interpreter._patch_lang = _remember(interpreter._patch_lang, interpreter)


def _take_wide_masks(builder: Any) -> None:
    """Lets loads and stores take masks that numpy has widened.

    `scalar_condition & tensor_condition` comes out as int8, which they refuse; vLLM's kernel for structured
    output has such a mask. A compiled kernel knows one bit only.
    """
    load, store = builder.create_masked_load, builder.create_masked_store

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool, copy=False)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool, copy=False)
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store


def _count_in_scalars(patch_lang_core: Callable[[Any, Any], None], tl: Any) -> Callable[[Any, Any], None]:
    """Gives what `tl.range` counts in the method `to`, which a compiled loop's scalar has.

    vLLM's kernel for top-k and top-p calls it.
    """

    class Scalar(int):
        def to(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
            return tl.cast(int(self), dtype, *args, **kwargs)

    def counting(lang: Any, scope: Any) -> None:
        patch_lang_core(lang, scope)
        count = lang.range
        scope.set_attr(lang, "range", lambda *args, **kwargs: map(Scalar, count(*args, **kwargs)))

    return counting


def _leave_out_overflow_checks(builder: Any) -> None:
    """Does integer operations once, not once more in 64 bits for a check that reports in debug mode only."""
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _unwrap_by_type(core: Any) -> Callable[[Any], Any]:
    """Takes most values as they are after one look: every argument of every operation passes through."""
    unwrap = core._unwrap_if_constexpr
    as_they_are = {
        core.tensor,
        core.dtype,
        core.block_type,
        core.pointer_type,
        int,
        float,
        bool,
        str,
        type(None),
    }

    def unwrap_by_type(value: Any) -> Any:
        return value if type(value) in as_they_are else unwrap(value)

    return unwrap_by_type


def _share_shapes(core: Any) -> None:
    """Checks and wraps each shape once, not anew for every value that has it."""
    known: dict[tuple[int, ...], tuple[Any, Any, str]] = {}
    of_values: dict[tuple[int, ...], tuple[Any, Any]] = {}
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple(map(core._unwrap_if_constexpr, shape))
        if key not in known or {*map(type, key)} != {int}:
            make_type(self, element_ty, shape)
            known[key] = self.shape, self.numel, f"<{self.shape}, "
            return
        self.element_ty = element_ty
        self.shape, self.numel, name = known[key]
        self.name = f"{name}{element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in of_values:
            make_tensor(self, handle, type)
            of_values[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_values[key]

    core.block_type.__init__, core.tensor.__init__ = init_type, init_tensor


def _call_at_once(interpreter: ModuleType) -> Callable[..., None]:
    """Calls a function of the language itself, not by way of the check that a kernel is what calls it."""
    semantic = interpreter.interpreter_semantic

    def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, call)

    return patch_attr


def _by_name(get_np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Types are asked for with each operation; those of blocks are new objects, and pointers have no hash."""
    known: dict[str, Any] = {}

    def by_name(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = get_np_dtype(dtype)
        return known[name]

    return by_name


def _remember(patch_lang: Callable[[Any], Any], interpreter: ModuleType) -> Callable[[Any], Any]:
    """Looks once for what is to be replaced in Triton's language, not anew for each kernel and function.

    That depends only on which of the language's two modules a kernel's own module names. A kernel's
    replacements are undone at its end; those of the functions that it calls are Triton's to keep.
    """
    languages = (interpreter.tl, interpreter.tl.core)
    of_kernels: dict[tuple[bool, ...], list[tuple[object, str, object]]] = {}
    of_functions: set[tuple[bool, ...]] = set()
    in_kernel = False

    class Scope(interpreter._LangPatchScope):  # type: ignore[name-defined,misc]
        def restore(self) -> None:
            nonlocal in_kernel
            in_kernel = False
            super().restore()

    def remembering(fn: Any) -> Any:
        nonlocal in_kernel
        values = {id(value) for value in fn.__globals__.values()}
        named = tuple(id(language) in values for language in languages)
        scope = Scope()
        if in_kernel:
            if named not in of_functions:
                of_functions.add(named)
                patch_lang(fn)
            return scope
        if named not in of_kernels:
            changes = patch_lang(fn)._changes
            of_kernels[named] = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
            scope._changes = changes
        else:
            for change in of_kernels[named]:
                scope.set_attr(*change)
        in_kernel = True
        return scope

    return remembering
