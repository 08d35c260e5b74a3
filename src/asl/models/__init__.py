"""Models: any timm backbone, the papers' heads, and weights from official, timm and own files."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asl.models.build import create_model
    from asl.models.weights import load_weights

__all__ = ["create_model", "load_weights"]

_MODULES = {"create_model": "asl.models.build", "load_weights": "asl.models.weights"}


def __getattr__(name: str) -> Any:
    # timm takes seconds to import, and asl.models.settings must be readable without it.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'asl.models' has no attribute {name!r}")
