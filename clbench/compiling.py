"""Training steps through PyTorch's compiler: a backbone's operators fused into few kernels."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clbench.conditions import Conditions
from clbench.errors import UserError
from clbench.nn.heads import Classifier
from clbench.population.companion import present
from clbench.types import CLASSIFICATION, Scenario, Setting

BACKEND = "inductor"
#: Random numbers as PyTorch draws them without the compiler, so that dropout drops the same.
OPTIONS: dict[str, Any] = {"fallback_random": True}
#: Variants of one function. Beyond its own limit of 8 the compiler would give up without a word,
#: and what a step computes would depend on how many came before.
_LIMIT = 1 << 20
_OFF = "Set compile=false."


def check(scenario: Scenario, conditions: Conditions) -> None:
    """Refuses what can't be compiled, before anything is loaded.

    Raises:
        UserError: With what works.
    """
    if scenario.setting is Setting.INSTRUCTION_TUNING:
        raise UserError(
            "compile=true: batches of text have a new length at almost every step, and each length "
            f"would be compiled for itself. {_OFF}"
        )
    if scenario.setting not in CLASSIFICATION:
        raise UserError(
            "compile=true is for training on labels. Methods of test-time adaptation exchange and "
            f"watch single layers of the model, which a compiled one does not have. {_OFF}"
        )
    if conditions.cache_features:
        raise UserError(
            "compile=true compiles the backbone, which cache_features=true leaves out. Set one of "
            "them to false."
        )
    if conditions.population:
        raise UserError(
            "compile=true does not go with population: its models are stacked and called as one. "
            f"Set population=0, or {_OFF[0].lower()}{_OFF[1:]}"
        )


def check_machine(device: torch.device) -> None:
    """Refuses a machine that has no compiler, and a run that several processes share.

    Raises:
        UserError: With what is missing.
    """
    if present().processes > 1:
        raise UserError(
            "compile=true is for runs of one process: where several share a run, the rows that "
            f"each has of a batch vary. Start one, or {_OFF[0].lower()}{_OFF[1:]}"
        )
    missing = _missing_for_gpu() if device.type == "cuda" else _missing_for_cpu()
    if missing:
        raise UserError(f"compile=true needs {missing}. Install it, or set compile=false.")


def _missing_for_gpu() -> str | None:
    from torch.utils._triton import has_triton

    return None if has_triton() else "Triton, and a GPU that it knows"


def _missing_for_cpu() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "a C++ compiler (g++; the variable CXX names another)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the headers of Python (python3-dev or python3-devel)"
    return None


def batch_sizes(scenario: Scenario) -> frozenset[int]:
    """Sizes that come at every step: of new samples, of stored ones, and of both together."""
    new, stored = scenario.batch_size, scenario.memory_batch_size or scenario.batch_size
    return frozenset({new, stored, new + stored})


@contextmanager
def compiled(
    model: nn.Module, sizes: Collection[int], spent: Callable[[float], None]
) -> Iterator[None]:
    """A model's backbone compiles itself within the block, once for each kind of training pass.

    Compiled is a call in training mode with gradients, a batch of one of the sizes, and no hooks
    within the backbone. Everything else (evaluation, teachers, gradients of single samples, the
    last, shorter batch of an epoch, prompts and adapters that hooks bring in) goes the usual way.
    So what is compiled depends on the call and not on what came before, and a run that was
    interrupted computes as if it had not been. Hooks on the backbone itself stay outside.

    Args:
        model: Changed in place; its weights and their names stay. Copies that are made of it
            within the block are compiled too, by the same code.
        sizes: Of batches.
        spent: Told the seconds that each compilation took, as soon as it has.

    Raises:
        UserError: If the model has no backbone.
    """
    if not isinstance(model, Classifier):
        raise UserError(
            "compile=true needs a model with features and a head, but this scenario makes a "
            f"{type(model).__name__}. {_OFF}"
        )
    part = model.features
    kind: type[Any] = type(part)
    with _clocked(spent), _unlimited():
        # A class of its own, not a method of the object: a copy of that would use the original.
        part.__class__ = _compiling(kind, sizes)
        try:
            yield
        finally:
            part.__class__ = kind
            torch.compiler.reset()


def _compiling(kind: type[Any], sizes: Collection[int]) -> type[Any]:
    """A subclass whose calls are compiled where they can be."""
    plain = kind.forward
    options = OPTIONS if BACKEND == "inductor" else None
    fixed: Callable[..., Any] = torch.compile(
        plain, dynamic=False, backend=BACKEND, options=options
    )

    def forward(self: nn.Module, x: Tensor) -> Any:
        fits = self.training and torch.is_grad_enabled() and len(x) in sizes
        return fixed(self, x) if fits and not _hooked(self) else plain(self, x)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _hooked(module: nn.Module) -> bool:
    """Whether hooks hang on what a module is made of: the compiler would forget new ones."""
    parts = module.modules()
    next(parts)  # itself
    return any(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        for part in parts
    )


@contextmanager
def _clocked(spent: Callable[[float], None]) -> Iterator[None]:
    """Tells how long each compilation within the block took."""
    from torch._dynamo.callback import callback_handler

    began = 0.0

    def start(_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(_: Any) -> None:
        spent(time.perf_counter() - began)

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        with suppress(ValueError):  # the reset has removed them
            callback_handler.remove_start_callback(start)
            callback_handler.remove_end_callback(end)


@contextmanager
def _unlimited() -> Iterator[None]:
    """As many variants as there are, and graphs that can be gone through backward twice."""
    import torch._dynamo.config as tracing
    import torch._functorch.config as differentiating

    limits = tracing.patch(recompile_limit=_LIMIT, accumulated_recompile_limit=_LIMIT)
    with limits, differentiating.patch(donated_buffer=False):
        yield
