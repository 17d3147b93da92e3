"""Which rows of a global batch a process needs: by the sharding, not by its number."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ditjax.parallel import processes


class Held:
    """A sharding of which this process's devices hold these rows."""

    def __init__(self, *ranges):
        self.ranges = ranges

    def addressable_devices_indices_map(self, shape):
        assert shape == (16,)
        return dict(enumerate((slice(*held),) for held in self.ranges))


@pytest.mark.parametrize(
    ("held", "rows"),
    [
        (Held((8, 12), (12, 16)), range(8, 16)),
        (Held((12, 16), (0, 4)), [0, 1, 2, 3, 12, 13, 14, 15]),
        (Held((4, 8), (4, 8), (0, 4), (0, 4)), range(8)),  # another axis repeats them
        (Held((None,), (None,)), range(16)),  # no axis splits them
    ],
)
def test_rows_of_a_process(held, rows):
    np.testing.assert_array_equal(processes.local_rows(held, 16), rows)


def test_example_i_is_row_i_on_a_mesh_in_any_order():
    whole = np.arange(48, dtype=np.float32).reshape(16, 3)
    devices = np.random.default_rng(0).permutation(np.array(jax.devices()))
    for shape in ((8, 1), (4, 2), (1, 8)):
        sharding = NamedSharding(Mesh(devices.reshape(shape), ("data", "tensor")), P("data"))
        rows = processes.local_rows(sharding, 16)
        array = processes.global_rows(sharding, 16, rows, whole[rows])
        assert array.sharding == sharding
        np.testing.assert_array_equal(array, whole)
        np.testing.assert_array_equal(processes.from_whole(sharding, whole), whole)


def test_a_short_batch_is_padded_with_zero_rows():
    rows = np.arange(1, 13, dtype=np.float32).reshape(2, 3, 2)
    padded = processes.padded(rows, 5)
    np.testing.assert_array_equal(padded[:2], rows)
    assert padded.shape == (5, 3, 2)
    assert padded.dtype == np.float32
    assert not padded[2:].any()
    assert processes.padded(np.arange(3), 3).tolist() == [0, 1, 2]
