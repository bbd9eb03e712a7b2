"""Megatron-Core on CPU and gloo: the few CUDA names it uses without asking are given CPU meanings.

Nothing is changed where CUDA is present. Three parts, from cold to hot:

1. ``install()`` (on importing ``megatron_spear.policy``, before megatron) replaces functions of
   ``torch.cuda`` that fail without a device: current device, streams, events, generator states;
   then it imports megatron without torch's compiler and wandb, which halves the time to start.
2. ``patch_megatron()`` (after importing megatron) gives the pipeline schedules, which write
   ``device="cuda"`` on the hot path, a view of torch whose factories allocate on the CPU, and the
   exchange of tokens between experts its sizes in the form that gloo takes.
3. ``cuda_means_cpu()`` is a context for building, stepping and saving, where such spellings are
   many and time does not count. It slows every torch call, so forward and backward run outside.

Works with megatron-core 0.16.1 and 0.19.2.
"""

import contextlib
import ctypes
import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_installed = False


def active() -> bool:
    """True where there is no CUDA and the CPU meanings are (to be) in force."""
    return not torch.cuda.is_available()


class _Nothing:
    """Stands for streams and events: the CPU is synchronous, so every method does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "_Nothing"]:
        return lambda *args, **kwargs: _Nothing()

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *exc: object) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def query(self) -> bool:
        return True


def install() -> None:
    """Give ``torch.cuda`` names CPU meanings; idempotent, nothing happens where CUDA is present."""
    global _installed
    if _installed or not active():
        return
    _installed = True
    # that apex and TransformerEngine are missing is what one expects here
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message="Please use DTensor instead")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+_tensor` is deprecated")
    cpu = torch.device("cpu")

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(int(value))  # torch.manual_seed itself calls us

    meanings: dict[str, Any] = {
        "current_device": lambda: cpu,
        "set_device": lambda *args: None,
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda: None,
        "Stream": _Nothing,
        "Event": _Nothing,
        "current_stream": lambda *args, **kwargs: _Nothing(),
        "default_stream": lambda *args, **kwargs: _Nothing(),
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": seed,
        "manual_seed_all": seed,
    }
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        meanings[name] = lambda *args, **kwargs: 0
    for name, meaning in meanings.items():
        setattr(torch.cuda, name, meaning)
    _keep_freed_memory()
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args, **kwargs: None
    _import_megatron()


def _import_megatron() -> None:
    """Import megatron; its small functions that are fused by compiling stay plain ones.

    Wrapping the first of them imports torch's compiler (1.5 s), and a logger that is not used here
    imports wandb (1 s). Both are to be had afterwards.
    """
    compiler, wandb = torch.compile, sys.modules.get("wandb")
    torch.compile = _uncompiled
    sys.modules["wandb"] = wandb  # type: ignore[assignment]  # None: importing it fails
    try:
        from megatron.core import jit
    finally:
        torch.compile = compiler
        if wandb is None:
            del sys.modules["wandb"]
    jit.disable_jit_fuser()  # for modules that are imported later


def _uncompiled(function: Any = None, **options: Any) -> Any:
    """What ``torch.compile`` gives, as it was, also as a decorator with options."""
    return _uncompiled if function is None else function


def _keep_freed_memory() -> None:
    """Let glibc reuse freed tensors instead of giving their pages back and faulting them in again.

    Activations of some MB come and go in every layer; this is worth a fifth of the training time.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError, OSError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 * 2**20)  # the most glibc takes
        libc.mallopt(trim_threshold, 2**30)


class _TorchOnCpu(types.ModuleType):
    """torch, except that factories asked for ``device="cuda"`` allocate on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in ("zeros", "ones", "empty", "full", "tensor", "arange"):
            setattr(self, name, _without_cuda(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _names_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _without_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return on_cpu


def patch_megatron() -> None:
    """Patch the megatron modules whose hot path names CUDA; idempotent, nothing with CUDA."""
    if not active():
        return
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    choose = HybridDeviceOptimizer._get_sub_optimizer_param_groups  # asks where a parameter is
    if not hasattr(choose, "__wrapped__"):
        HybridDeviceOptimizer._get_sub_optimizer_param_groups = _with_host_and_device(choose)
    token_dispatcher.maybe_move_tensor_to_cpu = _as_on_cpu
    schedules.torch = _TorchOnCpu()
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _as_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Sizes of an all-to-all as plain numbers, which gloo asks for; the rest is on the CPU."""
    return tensor.tolist() if as_numpy and torch.is_tensor(tensor) else tensor


class _HostAndDevice(TorchFunctionMode):  # type: ignore[misc]
    """Inside, tensors are on the device, except what ``.cpu()`` gives and what is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self._on_host: dict[int, torch.Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        on_host = id(args[0]) in self._on_host if args else False
        if func == torch.Tensor.is_cuda.__get__:  # made anew at each access
            return not on_host
        if func is torch.Tensor.cpu:
            func, on_host = torch.Tensor.clone, True
        result = func(*args, **(kwargs or {}))
        if on_host and torch.is_tensor(result):
            self._on_host[id(result)] = result  # held, so that no other gets its id
        return result


def _with_host_and_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def on_cpu(*args: Any) -> Any:
        with _HostAndDevice():
            return function(*args)

    return on_cpu


class CudaMeansCpu(TorchFunctionMode):  # type: ignore[misc]
    """Inside, tensors asked to CUDA are made on the CPU, or stay where they are."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # the optimizer tells dtypes by comparing with names such as torch.cuda.FloatTensor
            return "torch.cuda." + func(*args).rpartition(".")[2]  # whoever asked before, if nested
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device):
            args = (args[0], "cpu" if _names_cuda(args[1]) else args[1], *args[2:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


@contextlib.contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Inside, ``device="cuda"``, ``.cuda()`` and pinning mean the CPU; with CUDA, plain code."""
    if not active():
        yield
        return
    with CudaMeansCpu():
        yield
