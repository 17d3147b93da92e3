"""Imports go downwards only, by folder; the root holds commands and nothing else but five files."""

import ast
import configparser
import importlib
import sys
from pathlib import Path

import pytest

from ditjax.__main__ import COMMANDS as COMMANDS_TABLE

ROOT = Path(__file__).parent.parent / "ditjax"
EXPERIMENTS = ROOT.parent / "experiments"

# From the ground up. A file imports from lower floors and from its own folder; folders that share
# a floor never import one another.
FLOORS = (
    ("errors",),
    ("config", "recipes"),
    ("diffusion", "models", "metrics", "scaling", "files"),
    ("data",),
    ("parallel",),
    ("training",),
    ("weights", "runs"),
    ("tasks",),
    ("cli", "sampling", "studies"),
    ("evaluation", "reporting", "machines"),
    ("commands",),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
COMMANDS = (
    "train",
    "sample",
    "evaluate",
    "inspect",
    "sweep",
    "report",
    "flops",
    "classify",
    "encode",
    "convert",
    "grid",
    "bench",
    "plan",
    "transfer",
)
# Anyone may import these alone: they know arrays and errors, and no recipe.
WITHOUT_RECIPES = ("diffusion", "metrics", "scaling", "files")
ROOT_FILES = {"__init__", "__main__", "cli", "config", "errors", *COMMANDS}

# Third-party packages of the folders that are pure.
PURE = {
    "errors": set(),
    "config": set(),
    "diffusion": {"jax", "numpy"},
    "models": {"jax", "numpy", "flax"},
    "metrics": {"jax", "numpy"},
    "scaling": {"numpy", "scipy"},
    # Beside arrays, the clients of object stores: files/store.py imports them for a URL.
    "files": {"etils", "jax", "numpy", "ml_dtypes", "boto3", "botocore", "fsspec", "gcsfs"}
    | {"google", "requests", "huggingface_hub"},
    "training": {"jax", "numpy", "optax"},
    "parallel": {"jax", "numpy"},
    "tasks": {"jax", "numpy", "optax"},
    "studies": set(),
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def place(path: Path) -> str:
    """The folder that a file belongs to, or its name in the root; "commands" for a command."""
    top = path.relative_to(ROOT).with_suffix("").parts[0]
    return "commands" if top in (*COMMANDS, "__main__") else top


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # of a recipe, which is importable under two names
                assert ROOT not in path.parents, f"{path}: a relative import hides where it goes"
                continue
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(where: str, imported: set[str]) -> list[str]:
    """What a file of `where` imports and must not."""
    bad = []
    for module in imported:
        top, _, rest = module.partition(".")
        if top == "ditjax":
            target = rest.partition(".")[0]
            target = "commands" if target in COMMANDS else target
            if target == "config" and where in WITHOUT_RECIPES:
                bad.append(module)
            if target in FLOOR and target != where and FLOOR[target] >= FLOOR[where]:
                bad.append(module)
        elif top == "experiments" or (
            where in PURE and top not in sys.stdlib_module_names and top not in PURE[where]
        ):
            bad.append(module)
    return sorted(bad)


def test_the_root_holds_commands_and_five_files():
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_FILES
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(FLOOR) - {"errors", "config", "cli", "commands"}


@pytest.mark.parametrize(
    "path",
    [path for path in modules() if path.name != "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_imports_go_downwards(path):
    assert not violations(place(path), imports(path))


def test_the_rule_can_fail():
    assert violations("diffusion", {"ditjax.models.dit"}) == ["ditjax.models.dit"]
    assert violations("models", {"ditjax.tasks"}) == ["ditjax.tasks"]
    assert violations("diffusion", {"flax"}) == ["flax"]
    assert violations("files", {"ditjax.config"}) == ["ditjax.config"]
    assert violations("config", {"ditjax.parallel"}) == ["ditjax.parallel"]
    assert violations("reporting", {"ditjax.report"}) == ["ditjax.report"]
    assert violations("tasks", {"experiments.base"}) == ["experiments.base"]
    assert violations("training", {"jax.numpy", "ditjax.errors", "ditjax.models.cost"}) == []
    assert violations("commands", {"ditjax.train", "matplotlib"}) == []


def test_nothing_imports_pytorch():
    """The peer is a program of its own, so that ditjax is whole without PyTorch."""
    for path in modules():
        if path.stem != "peer":
            named = imports(path)
            tops = {name.partition(".")[0] for name in named}
            assert not (named | tops) & {"torch", "diffusers", "ditjax.machines.peer"}, path


def test_only_experiments_knows_recipes():
    for path in (ROOT.parent / "experiments").rglob("*.py"):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert tops <= {"ml_collections"}, path


def test_only_the_rules_name_partition_specs():
    for path in modules():
        named = {name.rpartition(".")[2] for name in imports(path)}
        if "PartitionSpec" in named:
            assert path == ROOT / "parallel" / "rules.py"


def test_every_folder_is_installed():
    """setup.cfg lists the packages, because the recipes come from another folder."""
    setup = configparser.ConfigParser()
    setup.read(ROOT.parent / "setup.cfg")
    listed = setup["options"]["packages"].split()
    assert listed == sorted(listed)
    recipes = [
        ".".join(("ditjax.recipes.shipped", *path.parent.relative_to(EXPERIMENTS).parts))
        for path in EXPERIMENTS.rglob("__init__.py")
    ]
    ours = [
        ".".join(path.parent.relative_to(ROOT.parent).parts) for path in ROOT.rglob("__init__.py")
    ]
    assert set(listed) == {*ours, *recipes}


def test_the_table_of_commands_is_the_root():
    assert set(COMMANDS_TABLE) == set(COMMANDS)
    for name in COMMANDS:
        assert callable(importlib.import_module(f"ditjax.{name}").main)


# What every file of its kind defines, to be found by name.
DOORS = {"main", "TASK", "NETWORK", "make", "check", "module", "cost"}


def test_a_public_name_is_defined_once():
    places: dict[str, list[str]] = {}
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [each.id for each in node.targets if isinstance(each, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            for name in {name for name in names if name[0] != "_"} - DOORS:
                places.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_function_is_longer_than_a_page():
    long = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert not long
