"""Stands for `sgl_kernel`, SGLang's compiled operators, whose wheels need CUDA or AVX-512.

SGLang imports operators from it by name at its start. Every name is here a function that raises
when it is called, so that an operator this CPU lacks is an error and never a wrong number: with the
plain torch backends that launch.sh asks for, SGLang calls none.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

__version__ = "0.4.10"  # what sglang 0.5.23 asks for
__path__: list[str] = []


class _ScalarTypes:
    """`sgl_kernel.scalar_types`: each quantised type is its own name."""

    def __getattr__(self, name: str) -> str:
        return name


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "scalar_types":
        return _ScalarTypes()

    def operator(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError(f"sgl_kernel.{name} was called; this environment has only its name")

    operator.__name__ = name
    return operator


class _SubmoduleStub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes every module below `sgl_kernel`, with the same attributes."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.startswith("sgl_kernel."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        vars(module).update(__path__=[], __getattr__=__getattr__)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(_SubmoduleStub())
