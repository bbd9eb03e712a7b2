"""Stands for `sgl_kernel`, SGLang's compiled operators, whose wheels are CUDA's or need AVX-512.

SGLang imports operators from it by name at its start. Each name is here a function that raises when it
is called, so that an operator this CPU does not have is an error and never a wrong number: the server is
started with the plain torch backends, which call none (see launch.sh).
"""

import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "0.4.10"  # the release that sglang 0.5.23 asks for
__path__: list[str] = []


class _ScalarTypes:
    """`sgl_kernel.scalar_types`: each quantised type is its own name."""

    def __getattr__(self, name):
        return name


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "scalar_types":
        return _ScalarTypes()

    def operator(*_args, **_kwargs):
        raise RuntimeError(f"sgl_kernel.{name} was called, and this environment has no sgl_kernel")

    operator.__name__ = name
    return operator


class _SubmoduleStub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes every module below `sgl_kernel`, with the same attributes."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith("sgl_kernel."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = __getattr__
        return module

    def exec_module(self, module):
        pass


sys.meta_path.append(_SubmoduleStub())
