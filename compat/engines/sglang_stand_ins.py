"""Stand-ins for what SGLang imports and does not use for text on a CPU: its environment's ``sitecustomize``."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import sys
from typing import Any
from unittest.mock import MagicMock

ABSENT = {
    *(
        "cuda",
        "decord",
        "decord2",
        "flash_attn",
        "flashinfer",
        "modelscope",
        "nvidia_cutlass_dsl",
        "quack",
        "sgl_kernel",
    ),
    *("datasets", "timm", "torchao", "torchvision"),
}


class StandIn(MagicMock):
    __path__: tuple[str, ...] = ()
    __all__: tuple[str, ...] = ()
    __version__ = "0.0.0"
    __file__ = "stand-in"


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        wanted = name.split(".")[0] in ABSENT
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: Any) -> Any:
        module = StandIn(name=spec.name)
        module.__name__, module.__spec__ = spec.name, spec
        return module

    def exec_module(self, module: Any) -> None:
        pass


installed_version = importlib.metadata.version


def version(name: str) -> str:
    return "0.0.1" if name in ABSENT else installed_version(name)


if os.environ.get("SGLANG_USE_CPU_ENGINE"):
    sys.meta_path.append(Finder())
    importlib.metadata.version = version
    import transformers.utils
    from transformers.utils import import_utils

    for asked in ("torchvision", "torchvision_v2", "torchcodec", "soundfile"):
        for module in (import_utils, transformers.utils):
            if hasattr(module, f"is_{asked}_available"):
                setattr(module, f"is_{asked}_available", lambda *_, **__: False)
