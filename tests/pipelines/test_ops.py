"""Our operators: DALI's types and the arrays of the C functions are of one table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import float64, int32, njit, uint8
from nvidia.dali import fn, pipeline_def

from fast_spatial.pipelines import ops

KINDS = (int32[::1], float64[:, :, ::1], uint8[:, ::1])
ARRAYS: list[np.ndarray[Any, Any]] = [
    np.arange(4, dtype=np.int32),
    np.arange(6, dtype=np.float64).reshape(1, 2, 3),
    np.arange(35, dtype=np.uint8).reshape(5, 7),
]


def pointers(arrays: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.array([array.ctypes.data for array in arrays])


def test_arrays_are_those_of_the_pointers_in_kind_and_order():
    @njit
    def read_and_write(data, shapes):
        one, three, two = ops._arrays(data, shapes, KINDS)
        one[3], three[0, 1, 2], two[4, 6] = 100, 0.5, 200
        return one, three, two

    arrays = [array.copy() for array in ARRAYS]
    shapes = [np.array(array.shape) for array in arrays]
    data, sizes = pointers(arrays), pointers(shapes)
    found = read_and_write(np.uint64(data.ctypes.data), np.uint64(sizes.ctypes.data))
    for array, same, before in zip(arrays, found, ARRAYS):
        assert same.dtype == array.dtype
        np.testing.assert_array_equal(same, array)
        assert (array != before).sum() == 1


def test_shapes_are_those_of_the_sample():
    """DALI lists the shapes of all samples of the first input, then those of the second."""

    @njit
    def shapes_of(shapes, sample):
        one, three, two = ops._shapes(shapes, sample, 2, KINDS)
        return one.copy(), three.copy(), two.copy()

    shapes = [np.array(shape) for shape in ((4,), (5,), (1, 2, 3), (4, 5, 6), (7, 8), (9, 10))]
    table = pointers(shapes)
    for sample in (0, 1):
        found = shapes_of(np.uint64(table.ctypes.data), sample)
        assert [tuple(shape) for shape in found] == [tuple(shape) for shape in shapes[sample::2]]


@pytest.mark.parametrize(
    ("header", "refused"),
    [(np.zeros((1, 6), np.int64), ""), (np.zeros((1, 6), np.int32), "type"), (np.zeros((1, 1, 6), np.int64), "dim")],
)
def test_an_input_of_another_type_or_rank_is_refused(header, refused):
    @pipeline_def(batch_size=1, num_threads=1, device_id=None, exec_dynamic=True)
    def graph() -> Any:
        given = [header, np.full((1, 3), 40), np.zeros((1, 2, 2)), np.ones((1, 10))]
        return ops.draw(*fn.external_source(lambda: given, num_outputs=4, batch=True))

    if not refused:
        assert [np.array(output.as_tensor()).shape for output in graph().run()] == [(1, 10), (1, 6), (1, 2, 2, 3)]
        return
    with pytest.raises(RuntimeError, match=refused):
        graph().run()
