"""Puts an import stub in torchvision's place, because only its CUDA wheel is on the package index.

That wheel's compiled operators do not load on CPU torch, and SGLang and transformers import torchvision
at their start, also for models that see no image. Every submodule exists here; every name in one is a
class that can be subclassed, compared or used as a decorator, and does nothing. A text model calls none.
Python runs this file at its start (it lies in site-packages as `sitecustomize`), in child processes too.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class _Name(type):
    """A class of which each attribute is a string and each call gives its argument back."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"

    def __call__(cls, *args, **kwargs):
        if args and callable(args[0]):  # used as a decorator
            return args[0]
        return lambda decorated=None, *_args, **_kwargs: decorated


def _module_attribute(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Name(name, (), {})


class _TorchvisionStub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes `torchvision` and every module below it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__version__ = "0.28.0"  # the release that belongs to torch 2.13
        module.__path__ = []
        module.__getattr__ = _module_attribute
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _TorchvisionStub())
