"""Imports go downwards only: commands -> programs -> build -> islands -> plain data."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ditjax"
ISLANDS = ("diffusion", "models", "metrics", "scaling", "training", "parallel", "io")

# Higher floors may import lower ones. Commands may call one another (sweep trains and evaluates).
FLOORS = {
    **dict.fromkeys(("errors", "masking", "sizes", "host", "chips", "__init__"), 0),
    **dict.fromkeys(ISLANDS, 1),
    "config": 1,
    "provenance": 1,
    "meter": 2,
    "build": 2,
    "programs": 3,
    "pretrained": 3,
    "digits": 3,
    "studies": 3,
    "scenes": 4,
    "runs": 4,
    "features": 5,
    "scoring": 5,
    "evaluation": 6,
    "status": 6,
    "pipeline": 5,
    "validation": 5,
    "planning": 4,
    "published": 2,
    "costs": 4,
    "cli": 5,
    "reporting": 5,
    "peer": 0,
}
COMMAND = 7
COMMANDS = (
    "train", "sample", "evaluate", "sweep", "report", "flops", "classify", "encode",
    "convert", "grid", "bench", "plan", "transfer",
)  # fmt: skip

# Third-party packages by floor; NumPy, JAX's typing aside, is what all of them share.
STDLIB_FREE = {
    "errors": set(),
    "masking": set(),
    "sizes": set(),
    "host": set(),
    "chips": set(),
    "config": set(),
    "provenance": {"jax"},
    "diffusion": {"jax", "numpy"},
    "models": {"jax", "numpy", "flax"},
    "metrics": {"jax", "numpy"},
    "scaling": {"numpy", "scipy"},
    "training": {"jax", "optax"},
    "parallel": {"jax", "numpy"},
    "io": {
        "absl", "array_record", "clu", "etils", "grain", "jax", "ml_dtypes", "numpy", "orbax",
        "PIL", "safetensors", "sklearn", "tensorboardX", "tensorflow_datasets",
    },
    "build": {"jax", "numpy", "optax"},
    "meter": {"jax", "numpy"},
    "programs": {"jax", "numpy"},
    "pretrained": {"jax", "numpy"},
    "digits": {"jax", "numpy"},
    "studies": set(),
    "status": set(),
    "scenes": {"numpy"},
    "runs": {"jax", "numpy"},
    "features": {"jax", "numpy"},
    "scoring": {"jax", "numpy"},
    "pipeline": {"jax", "numpy", "PIL"},
    "planning": {"jax", "numpy"},
    "published": set(),
    "costs": set(),
    "evaluation": {"jax", "numpy"},
    "validation": {"jax", "numpy"},
    "cli": {"absl", "ml_collections"},
    "reporting": {"jinja2", "matplotlib", "numpy", "PIL"},
    "peer": {"diffusers", "torch"},
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py"))


def place(path: Path) -> str:
    """The floor or island that a file belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it goes"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(name: str) -> int:
    return FLOORS.get(name, COMMAND)


def violations(where: str, imported: set[str]) -> list[str]:
    """What a file of `where` imports and must not."""
    import sys

    bad = []
    for module in imported:
        top, _, rest = module.partition(".")
        if top == "ditjax":
            target = rest.partition(".")[0]
            if not target or target == where or target not in {*FLOORS, *COMMANDS}:
                continue
            sideways = floor(target) == floor(where) == 1
            if floor(target) > floor(where) or sideways:
                bad.append(module)
        elif top == "experiments" or (
            top not in sys.stdlib_module_names and where in STDLIB_FREE
            and top not in STDLIB_FREE[where]
        ):  # fmt: skip
            bad.append(module)
    return sorted(bad)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    where = place(path)
    assert where in {*FLOORS, *COMMANDS}, f"{path} has no floor: give it one here"
    assert not violations(where, imports(path))


def test_the_rule_can_fail():
    assert violations("diffusion", {"ditjax.models.dit"}) == ["ditjax.models.dit"]
    assert violations("models", {"ditjax.build"}) == ["ditjax.build"]
    assert violations("diffusion", {"flax"}) == ["flax"]
    assert violations("config", {"ditjax.diffusion"}) == ["ditjax.diffusion"]
    assert violations("reporting", {"ditjax.report"}) == ["ditjax.report"]
    assert violations("build", {"experiments.base"}) == ["experiments.base"]
    assert violations("training", {"jax.numpy", "ditjax.errors", "ditjax.sizes"}) == []
    assert violations("sweep", {"ditjax.train", "matplotlib"}) == []


def test_nothing_imports_pytorch():
    """The peer is a program of its own, so that ditjax is whole without PyTorch."""
    for path in modules():
        if place(path) != "peer":
            named = imports(path)
            tops = {name.partition(".")[0] for name in named}
            assert not (named | tops) & {"torch", "diffusers", "ditjax.peer"}, path


def test_only_experiments_knows_recipes():
    for path in (ROOT.parent / "experiments").rglob("*.py"):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert tops <= {"ml_collections", "experiments"}, path


def test_only_the_rules_name_partition_specs():
    for path in modules():
        named = {name.rpartition(".")[2] for name in imports(path)}
        if "PartitionSpec" in named:
            assert path == ROOT / "parallel" / "rules.py"
