"""Run packed models on a CPU. Imports neither torch nor anything of this package that does."""

from .answer import Generation
from .engine import Conversation, Engine
from .scorer import EngineScorer

__all__ = ["Conversation", "Engine", "EngineScorer", "Generation"]
