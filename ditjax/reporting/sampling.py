"""Quality against the compute of sampling, from the grid.json of `python -m ditjax.grid`."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditjax.errors import FaultError, UserError
from ditjax.files.atomic import load_json
from ditjax.files.store import place
from ditjax.runs.results import Found
from ditjax.runs.rundir import RUNS
from ditjax.scaling.claims import Claim, sampling_does_not_make_up
from ditjax.studies.words import plural

GRID_FILE = "grid.json"


@dataclass(frozen=True)
class Sampled:
    """One cell of a grid: its run, the Gflops of sampling one image, and the metric."""

    run: Found
    gflops: float
    value: float


def read_sampled(
    folders: Sequence[str | Path], found: Sequence[Found], metric: str, problems: list[str]
) -> list[Sampled]:
    """Read the grid.json files in the folders and one level below, for the runs in `found`.

    Only cells with the most frequent combination of guidance, sampler and number of samples are
    kept, so that cells differ only in their steps. A file that cannot be read is added to
    `problems`, and so is the number of cells that are left out.
    """
    left = Counter[str]()
    by_name = {each.result["run"]: each for each in found}
    kept: list[tuple[str, Sampled]] = []
    for path in _files(folders):
        try:
            cells = load_json(path)["cells"]
            for cell in cells:
                value = cell["metrics"].get(metric)
                gflops, run = float(cell["sampling_gflops"]), by_name.get(cell["run"])
                if run is None:
                    left["of runs without a result here"] += 1
                elif value is None or not (gflops > 0 and 0 < float(value) < math.inf):
                    left[f"without a {metric}"] += 1
                else:
                    kept.append((_same(cell), Sampled(run, gflops, float(value))))
        except (FaultError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            problems.append(f"{path} is no whole grid ({type(error).__name__}: {error}).")
    most = Counter(same for same, _ in kept).most_common(1)[0][0] if kept else ""
    left["of other settings than most"] += sum(same != most for same, _ in kept)
    if left := +left:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left.items())
        problems.append(f"grids: {plural(left.total(), 'cell')} left out: {reasons}.")
    unique = {(id(one.run), one.gflops): one for same, one in kept if same == most}
    return sorted(unique.values(), key=lambda one: (one.run.result["gflops"], one.gflops))


def _files(folders: Sequence[str | Path]) -> Iterable[Path]:
    seen = set()
    for folder in map(place, folders):
        root = folder.parent if folder.name == RUNS else folder
        for path in (root / GRID_FILE, *sorted(root.glob(f"*/{GRID_FILE}"))):
            if path.is_file() and path.resolve() not in seen:
                seen.add(path.resolve())
                yield path


def _same(cell: dict[str, Any]) -> str:
    """What is equal for cells that differ only in their sampling steps."""
    settings = {key: value for key, value in cell["settings"].items() if key != "steps"}
    protocol = {key: value for key, value in cell["protocol"].items() if key != "steps"}
    return repr((sorted(settings.items()), sorted(protocol.items())))


def sampling_claim(sampled: Sequence[Sampled]) -> Claim:
    """Test that more sampling compute does not make up for a small model."""
    try:
        return sampling_does_not_make_up(
            [one.run.result["gflops"] for one in sampled],
            [one.gflops for one in sampled],
            [one.value for one in sampled],
        )
    except UserError as error:
        return Claim("More sampling compute does not make up for a small model.", None, str(error))
