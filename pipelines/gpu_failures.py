"""Counting the batches of good files that a GPU failed to decode."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# After this many failures on good files, the GPU decoder is no longer used. After this many good batches in a row, the
# count restarts.
MOST_GPU_FAILURES = 10
GOOD_BATCHES = 1000


class GpuFailures:
    """The number of failures that no odd file explains: those which the same file can explain count once.

    Attributes:
        count: failures since the last restart of the count.

    """

    def __init__(self) -> None:
        self.count = 0
        self._good_batches = 0  # since the last failure
        # For each batch that failed: the images that have not been decoded since.
        self._suspects: list[NDArray[np.int64]] = []

    def add_good(self, positions: NDArray[np.int64]) -> None:
        """Count a batch that was decoded as configured: none of its files, int64 [B], explains a failure."""
        self._good_batches += 1
        if self._good_batches == GOOD_BATCHES:
            self.count = 0
        if self._suspects:
            left = (np.setdiff1d(suspects, positions) for suspects in self._suspects)
            self._suspects = [suspects for suspects in left if len(suspects)]

    def add_failure(self, positions: NDArray[np.int64]) -> bool:
        """Count a failed batch of files, int64 [B]; whether the GPU should decode no more."""
        went_on, self._good_batches = self._good_batches > 0, 0
        for number, suspects in enumerate(self._suspects):
            common = np.intersect1d(suspects, positions)
            if went_on and len(common):
                self._suspects[number] = common
                return False
        self._suspects.append(positions)
        self.count += 1
        return self.count == MOST_GPU_FAILURES
