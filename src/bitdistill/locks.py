"""Locks between processes that share a folder: of one machine, or of several on a file system that knows ``flock``.

The operating system releases a lock when its process ends, however it ends.
"""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file ``path``, which is made if it is not there and stays.

    Yields:
        True, or False where another process holds it and ``wait`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            logger.info("%s: another process is making this; waiting for it", path.stem)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield True
