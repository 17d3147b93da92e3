"""The shipped recipes, `experiments/` of the repository: `--config=NAME` takes one by name."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ditjax.errors import UserError, nearest, reason

# In a checkout the recipes are in `experiments/`; an installed package has a copy of it.
_FOLDERS = (Path(__file__).resolve().parents[2] / "experiments", Path(__file__).parent / "shipped")
__path__ = [str(next(folder for folder in _FOLDERS if (folder / "base.py").is_file()))]


def names() -> list[str]:
    """Every shipped recipe: 'digits', 'small/scaling', ..."""
    root = Path(__path__[0])
    files = (path.relative_to(root).with_suffix("") for path in sorted(root.rglob("*.py")))
    return [
        str(file)
        for file in files
        if file.name != "__init__"
        and "def get_config(" in (root / file).with_suffix(".py").read_text()
    ]


def load(text: str) -> dict[str, Any]:
    """'NAME[:ARG]' or 'FILE.py[:ARG]' -> what the recipe's get_config(ARG) returns, as plain dicts.

    Raises UserError for a name that is none, and for a recipe that fails, with its line.
    """
    name, given, arg = text.partition(":")
    try:
        tree = _module(name).get_config(*([arg] if given else []))
    except UserError:
        raise
    except Exception as error:  # a recipe is the user's own code
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"recipe {name!r} failed at {frame.filename}:{frame.lineno}:"
            f" {type(error).__name__}: {reason(error)}"
        ) from None
    tree = tree.to_dict() if hasattr(tree, "to_dict") else tree
    if not isinstance(tree, Mapping):
        raise UserError(
            f"recipe {name!r}: get_config() returned a {type(tree).__name__}: expected a ConfigDict"
            " or a dict of keys."
        )
    return dict(tree)


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        known = names()
        if name not in known:
            raise UserError(
                f"recipe {name!r} does not exist: expected one of {', '.join(known)}, or a FILE.py"
                f" with a get_config().{nearest(name, known)}"
            )
        return importlib.import_module(f"{__name__}.{name.replace('/', '.')}")
    path = Path(name).resolve()
    if not path.is_file():
        raise UserError(f"recipe {name!r} does not exist: expected a file with a get_config().")
    # A recipe imports its neighbours, from wherever the command runs.
    package = path.parent
    while (package / "__init__.py").is_file():
        package = package.parent
    if str(package) not in sys.path:
        sys.path.insert(0, str(package))
    if package != path.parent:
        return importlib.import_module(".".join(path.with_suffix("").relative_to(package).parts))
    # Not by its name, which another module may have.
    spec = importlib.util.spec_from_file_location(f"ditjax_recipe_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
