"""Stand-in for torchvision where none that matches the installed torch exists: names exist, functions raise.

SGLang and transformers import it for image models while their modules load; a language model on a CPU does not use it.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

__version__ = "0.0.0+standin"


class _Part(types.ModuleType):
    """A submodule in which every class is empty and every function raises NotImplementedError."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        value = type(name, (), {"__module__": self.__name__}) if name[0].isupper() else _raiser(full)
        setattr(self, name, value)
        return value


class _InterpolationMode:
    """Names of torchvision's interpolation modes."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"
    BOX = "box"
    HAMMING = "hamming"


def _raiser(name: str) -> Any:
    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise NotImplementedError(f"{name} cannot run: torchvision is not installed here")

    return refuse


def _part(name: str, *, interpolation: bool = False) -> _Part:
    part = _Part(f"{__name__}.{name}")
    if interpolation:
        part.InterpolationMode = _InterpolationMode  # type: ignore[attr-defined]
    return part


io = _part("io")
ops = _part("ops")
models = _part("models")
transforms: Any = _part("transforms", interpolation=True)
transforms.functional = _part("transforms.functional", interpolation=True)
transforms.v2 = _part("transforms.v2", interpolation=True)
transforms.v2.functional = _part("transforms.v2.functional", interpolation=True)
