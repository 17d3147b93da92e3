"""Every fault of the battery, tried once or twice: python -m tests.faults tries them for long.

Left out by -m "not faults".
"""

from collections.abc import Iterator

import pytest

from tests.faults import table
from tests.faults.harness import Battery

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def battery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Battery]:
    with Battery(tmp_path_factory.mktemp("faults")) as made:
        yield made


@pytest.mark.parametrize(
    ("row", "number"),
    [pytest.param(row, i, id=f"{row.name}-{i}") for row in table.ROWS for i in row.quick],
)
def test_nothing_is_lost(battery: Battery, row: table.Row, number: int) -> None:
    table.attempt(battery, row, number, seed=0)
