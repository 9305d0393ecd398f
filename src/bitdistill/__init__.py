"""Convert Hugging Face language models into 1.58-bit (ternary) task models, and run them on a CPU."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import Engine as Engine
    from .engine import Generation as Generation

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``Engine`` and ``Generation``, on first use: ``import bitdistill`` itself does no work."""
    if name in ("Engine", "Generation"):
        from . import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
