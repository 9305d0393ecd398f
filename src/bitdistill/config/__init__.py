"""What a recipe can say: frozen dataclasses, one per section. The only place that holds defaults."""

from .checks import LARGEST_SIZE
from .data import TASK_KINDS, CorpusConfig, ModelConfig, TaskConfig
from .run import ABLATIONS, LABELS, METHODS, Recipe, RunConfig
from .stages import KD_KEYS, DistillConfig, PretrainConfig, RefineConfig, SftConfig
from .training import SHAPE, SIZES, BaseConfig, CorpusTrainingConfig, TrainingConfig

__all__ = [
    "ABLATIONS",
    "KD_KEYS",
    "LABELS",
    "LARGEST_SIZE",
    "METHODS",
    "SHAPE",
    "SIZES",
    "TASK_KINDS",
    "BaseConfig",
    "CorpusConfig",
    "CorpusTrainingConfig",
    "DistillConfig",
    "ModelConfig",
    "PretrainConfig",
    "Recipe",
    "RefineConfig",
    "RunConfig",
    "SftConfig",
    "TaskConfig",
    "TrainingConfig",
]
