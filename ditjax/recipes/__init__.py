"""The shipped recipes (`experiments/` in the repository), selected by `--config=NAME`."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ditjax.errors import UserError, nearest, reason, shown

# In a checkout the recipes are in `experiments/`; an installed package has a copy of it.
_FOLDERS = (Path(__file__).resolve().parents[2] / "experiments", Path(__file__).parent / "shipped")
__path__ = [str(next(folder for folder in _FOLDERS if (folder / "base.py").is_file()))]


def list_recipes() -> list[str]:
    """The names of all shipped recipes: 'digits', 'small/scaling', ..."""
    root = Path(__path__[0])
    files = (path.relative_to(root).with_suffix("") for path in sorted(root.rglob("*.py")))
    return [
        str(file)
        for file in files
        if file.name != "__init__"
        and "def get_config(" in (root / file).with_suffix(".py").read_text()
    ]


def build(text: str) -> dict[str, Any]:
    """'NAME[:ARG]' or 'FILE.py[:ARG]' -> the result of the recipe's get_config(ARG), as dicts.

    Raises UserError for an unknown name, and for a recipe that fails, with the line where it does.
    """
    name, colon, arg = text.partition(":")
    try:
        get_config = _module(name).get_config
        if colon and not inspect.signature(get_config).parameters:
            raise UserError(f"--config={text}: recipe {name!r} takes nothing after a colon.")
        tree = get_config(*([arg] if colon else []))
    except UserError:
        raise
    except Exception as error:  # a recipe is the user's code
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if colon and (frame.line or "").startswith("raise ValueError"):  # refuses its argument
            raise UserError(f"--config={shown(text)[1:-1]}: {reason(error)}.") from None
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
        known = list_recipes()
        if name not in known:
            raise UserError(
                f"recipe {name!r} does not exist: expected one of {', '.join(known)}, or a FILE.py"
                f" with a get_config().{nearest(name, known)}"
            )
        return importlib.import_module(f"{__name__}.{name.replace('/', '.')}")
    path = Path(name).resolve()
    if not path.is_file():
        raise UserError(f"recipe {name!r} does not exist: expected a file with a get_config().")
    # A recipe can import its neighbours, whatever the working directory is.
    package = path.parent
    while (package / "__init__.py").is_file():
        package = package.parent
    if str(package) not in sys.path:
        sys.path.insert(0, str(package))
    if package != path.parent:
        return importlib.import_module(".".join(path.with_suffix("").relative_to(package).parts))
    # Not under its own name, which another module may have.
    spec = importlib.util.spec_from_file_location(f"ditjax_recipe_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
