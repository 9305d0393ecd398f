"""The exception tree. Every message says what is wrong, where, and what to do about it.

Each class also derives from the standard-library error it refines, so that callers who do not know
this package can still catch it. All of them end the command line with exit status 1 and one message.
"""


class BitDistillError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigError(BitDistillError, ValueError):
    """A recipe or a ``--set`` names an unknown key or holds an impossible value."""


class DataError(BitDistillError, ValueError):
    """A data set or corpus is missing, empty, mislabelled or in another shape than declared."""


class SurgeryError(BitDistillError, ValueError):
    """A model cannot be converted into a ternary student."""


class CheckpointError(BitDistillError, OSError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another recipe."""


class TrainingError(BitDistillError, RuntimeError):
    """Training cannot go on (non-finite loss, teacher and student that do not fit together)."""


class EngineError(BitDistillError, ValueError):
    """The engine was asked for what it cannot do: an empty prompt, a text beyond the context, impossible sampling."""
