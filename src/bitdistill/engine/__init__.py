"""Run packed models on a CPU. Imports neither torch nor anything of this package that does."""

from .engine import Conversation, Engine, Generation
from .scorer import EngineScorer

__all__ = ["Conversation", "Engine", "EngineScorer", "Generation"]
