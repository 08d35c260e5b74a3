"""Models: any timm backbone, the papers' heads, and weights from official, timm and own files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asl.models.build import create_model, load_weights

__all__ = ["create_model", "load_weights"]


def __getattr__(name: str) -> Any:
    # timm takes seconds to import. The settings beside it are read without it.
    if name in __all__:
        from asl.models import build

        return getattr(build, name)
    raise AttributeError(f"module 'asl.models' has no attribute {name!r}")
