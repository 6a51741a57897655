"""Stand-in for Triton where it is not installed: kernels can be defined and decorated, but not launched.

SGLang imports Triton and decorates GPU kernels while its modules load. On a CPU none of them runs, so here every name
exists, every decorator returns what it decorates, and launching a kernel raises NotImplementedError.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__version__ = "3.9.0"


class _Nothing(types.ModuleType):
    """Works as a module, an attribute or a decorator, depending on how the importing code uses it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, _LOADER, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _make(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return _decorator(*arguments, **keywords)

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False


class _Kernel:
    """Result of `jit`: keeps the function, raises when launched."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = function
        self.__name__ = getattr(function, "__name__", "kernel")
        self.__doc__ = function.__doc__

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        raise NotImplementedError(f"the Triton kernel {self.__name__} cannot run: Triton is not installed here")


def _make(name: str) -> Any:
    """Capitalised names become classes, so that they can be subclassed and used in annotations."""
    if name in sys.modules:
        return sys.modules[name]
    module, _, last = name.rpartition(".")
    if last[0].isupper():
        return type(last, (), {"__module__": module, "__init__": lambda self, *arguments, **keywords: None})
    return _Nothing(name)


def _decorator(*arguments: Any, **keywords: Any) -> Any:
    """Works as `@name` and as `@name(...)`."""
    if len(arguments) == 1 and callable(arguments[0]) and not keywords:
        return arguments[0]
    return lambda decorated: decorated


def jit(*arguments: Any, **keywords: Any) -> Any:
    """Works as `@jit` and as `@jit(...)`; the result cannot be launched."""
    if len(arguments) == 1 and callable(arguments[0]) and not keywords:
        return _Kernel(arguments[0])
    return _Kernel


autotune = heuristics = _decorator


def cdiv(a: int, b: int) -> int:
    """Division, rounding up."""
    return -(a // -b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length() if n > 0 else 1


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing."""


class _Finder(importlib.abc.MetaPathFinder):
    """Finds any submodule name of this package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(fullname, _LOADER, is_package=True)


_LOADER = _Loader()
sys.meta_path.append(_Finder())


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    value = _make(f"{__name__}.{name}")
    setattr(sys.modules[__name__], name, value)
    return value
