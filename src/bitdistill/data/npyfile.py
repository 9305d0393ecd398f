"""A one-dimensional ``.npy`` file that grows while it is written, for arrays that memory need not hold."""

from pathlib import Path
from types import TracebackType

import numpy as np


class GrowingArray:
    """Append runs of one dtype; leaving the ``with`` block writes the final length into the header.

    numpy pads the header of an array so that its first axis can grow in place.
    """

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        self.size = 0
        self.stream = path.open("wb")
        self._write_header()
        self.data_start = self.stream.tell()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.size,),
        }
        np.lib.format.write_array_header_1_0(self.stream, header)

    def append(self, run: np.ndarray) -> None:
        """Write the elements of ``run`` behind what is there."""
        assert run.dtype == self.dtype
        self.stream.write(run.tobytes())
        self.size += run.size

    def __enter__(self) -> "GrowingArray":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.stream:
            if error is None:
                self.stream.seek(0)
                self._write_header()
                assert self.stream.tell() == self.data_start
