"""Puts an import stub in torchvision's place, of which the package index has only a CUDA wheel.

Its compiled operators do not load on CPU torch, and SGLang and transformers import torchvision at
their start, also for models that see no image. Every submodule exists here; every name in one is a
class that can be subclassed, compared or used as a decorator, and does nothing: a text model calls
none. As `sitecustomize` in site-packages Python runs this at its start, in child processes too.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any


class _Name(type):
    """A class of which every attribute is a string and every call gives back what it decorates."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and callable(args[0]):
            return args[0]
        return lambda decorated=None, *_args, **_kwargs: decorated


def _attribute(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Name(name, (), {})


class _TorchvisionStub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes `torchvision` and every module below it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        # 0.28 belongs to torch 2.13; transformers asks for the version.
        vars(module).update(__version__="0.28.0", __path__=[], __getattr__=_attribute)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.insert(0, _TorchvisionStub())
