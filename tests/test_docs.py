"""The manual is true: command lines parse, links resolve, functions, keys and recipes exist.

Command lines come from fenced code of the pages, docstrings of recipes, the notebook, and strings
of the package. Shell is read roughly: variables, loops (their first value) and launch scripts that
take a command of ditjax. What a command reads need not exist: `check_command` looks at flags and
the recipe only.
"""

import argparse
import ast
import contextlib
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ditjax import cli, config, recipes
from ditjax.__main__ import COMMANDS
from ditjax.errors import UserError
from ditjax.runs import rundir

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
LAUNCHERS = ("host.sh", "slurm.sh", "tpu_pod.sh", "gke.sh")
ACTIONS = ("run", "xpk", "keep")  # of the last two
README_LINES, TRAIN_WITHIN = 150, 40


class Line(NamedTuple):
    """A command line: where it is, and the command of ditjax with its flags."""

    where: str
    words: tuple[str, ...]


# ---- shell


def simple_commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a script, with variables expanded as text."""
    variables: dict[str, str] = {}

    def value(match: re.Match[str]) -> str:
        return variables.get(match[1] or match[2], f"x/{match[1] or match[2]}")

    for line in script.replace("\\\n", " ").splitlines():
        text = re.sub(r"\$\([^)]*\)", "x", line)
        text = re.sub(r"\$(?:\{(\w+)[^}]*\}|(\w+))", value, text)
        tokens = shlex.shlex(text, posix=True, punctuation_chars=";&|<>()")
        tokens.whitespace_split = True
        command: list[str] = []
        for token in [*tokens, ";"]:
            if token and set(token) <= set(";&|<>()"):
                yield from _run(command, variables)
                command = []
            else:
                command.append(token)


def _run(command: list[str], variables: dict[str, str]) -> Iterator[list[str]]:
    """Take in what a command sets; give it without that, if anything is left."""
    if command[:1] == ["for"]:
        variables[command[1]] = command[3]
        return
    words = command[1:] if command[:1] in (["do"], ["export"]) else command
    while words and (match := re.fullmatch(r"(\w+)=(.*)", words[0], re.DOTALL)):
        variables[match[1]] = match[2]
        words = words[1:]
    if words:
        yield words


def of_ditjax(words: list[str]) -> list[str] | None:
    """The command of ditjax in a shell's command, with its flags; None where there is none."""
    words = [word for word in words if word != "..."]
    if words[0] == "ditjax":
        return words[1:]
    if words[0].endswith("python") and words[1:2] == ["-m"]:
        module, rest = words[2], words[3:]
        return rest if module == "ditjax" else _after("ditjax.", module, rest)
    for k, word in enumerate(words):
        if Path(word).name in LAUNCHERS and "launch/" in word:
            rest = words[k + 1 :]
            rest = rest[1:] if rest[:1] and rest[0] in ACTIONS else rest
            return rest if rest and rest[0] in COMMANDS else None
        if word.startswith("COMMAND="):
            return shlex.split(word.removeprefix("COMMAND="))
    return None


def _after(prefix: str, module: str, rest: list[str]) -> list[str] | None:
    return [module.removeprefix(prefix), *rest] if module.startswith(prefix) else None


# ---- where command lines are


def fences(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, language, text) of each fenced block of a page."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start()) + 2, match[1], match[2]


def in_shell(where: str, script: str) -> Iterator[Line]:
    for words in simple_commands(script):
        if found := of_ditjax(words):
            yield Line(where, tuple(found))


def in_pages() -> Iterator[Line]:
    for path in PAGES:
        for line, language, text in fences(path):
            if language in ("bash", "sh"):
                yield from in_shell(f"{path.relative_to(ROOT)}:{line}", text)


def in_recipes() -> Iterator[Line]:
    """The indented lines of their docstrings."""
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        code = (line for line in docstring.splitlines() if line.startswith("    "))
        yield from in_shell(str(path.relative_to(ROOT)), "\n".join(code))


_COMMAND = re.compile(rf"(?:python -m ditjax[. ]|\bditjax )({'|'.join(COMMANDS)})((?: +--\S+)+)")


def in_strings() -> Iterator[Line]:
    """Docstrings and messages of the package."""
    for path in sorted((ROOT / "ditjax").rglob("*.py")):
        for line, text in strings(ast.parse(path.read_text(encoding="utf-8"))):
            for match in _COMMAND.finditer(" ".join(text.split())):
                flags = [word.rstrip(".,;:)`'") for word in match[2].split()]
                # '--config=...' stands for any recipe.
                flags = ["--config=digits" if flag == "--config=" else flag for flag in flags]
                yield Line(f"{path.relative_to(ROOT)}:{line}", (match[1], *flags))


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of each string; what an f-string fills in is 1, which a path may be, too."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.expr) and (text := _text(node)):
            yield node.lineno, text
        else:
            nodes.extend(ast.iter_child_nodes(node))


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "1" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def in_notebook() -> Iterator[Line]:
    """Calls of the notebook's `ditjax(...)`."""
    for number, source in code_cells():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ditjax":
                yield Line(f"quickstart.ipynb:{number}", tuple(map(_text, node.args)))


def code_cells() -> Iterator[tuple[int, str]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            yield number, "".join(cell["source"])


LINES = [*in_pages(), *in_recipes(), *in_strings(), *in_notebook()]


def recipes_of_runs() -> dict[str, str]:
    """'--workdir=RUN' -> '--config=RECIPE' of the lines that train it."""
    found = {}
    for _, words in LINES:
        flags = {word.partition("=")[0]: word for word in words if "=" in word}
        if words[0] == "train" and {"--workdir", "--config"} <= flags.keys():
            found[flags["--workdir"]] = flags["--config"]
    return found


RUNS = recipes_of_runs()


class ParsedError(Exception):
    """A command line parsed: the command would begin its work now."""


def check_command(words: list[str]) -> None:
    """Parse a command's flags and its recipe. Raises UserError; nothing is read or begun."""
    command, *flags = words

    def parse(parser: cli.Parser, argv: Any = None, namespace: Any = None) -> Any:
        _, rest = argparse.ArgumentParser.parse_known_args(parser, cli.join_overrides(argv))
        for word in rest:
            if not word.startswith("--config"):
                raise UserError(f"{word!r} is no flag of {command}")
        named = any(word.startswith("--config=") for word in rest)
        if named or (rest and command != "grid"):
            # A command on a run takes the keys of the recipe that the manual trains it by.
            of_run = [RUNS[word] for word in flags if word in RUNS and not named]
            config.read(cli.load_recipe([*of_run, *rest], None if named or of_run else {}))
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ParsedError):
        patch.setattr(cli.Parser, "parse_known_args", parse)
        importlib.import_module(f"ditjax.{command}").main(flags)


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.where} {line.words[0]}")
def test_every_command_line_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(list(line.words))


def test_a_wrong_command_line_is_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    of_run = ["evaluate", "--workdir=runs/small/unclip_decoder", "--config.unclip.sauce=text"]
    for words in (of_run, ["train", "--wrokdir=x"], ["sweep", "--config=no_such", "--workdir=x"]):
        with pytest.raises(UserError):
            check_command(words)


def test_commands_are_found_where_they_are():
    found = {line.where.partition(":")[0] for line in LINES}
    assert {"README.md", "docs/machines.md", "experiments/digits.py", "quickstart.ipynb"} <= found
    script = "R=a\nfor S in 1 2; do\n  ditjax train --workdir=$R/$S  # why\ndone; bash x.sh"
    assert [line.words for line in in_shell("", script)] == [("train", "--workdir=a/1")]


def test_scripts_and_modules_that_pages_name_exist():
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"launch/[\w.]+\.(?:sh|yaml)", text):
            assert (ROOT / name).is_file(), f"{path}: {name}"
        for module in re.findall(r"python -m (tests[\w.]*\w)", text):
            stem = ROOT / module.replace(".", "/")
            assert stem.with_suffix(".py").is_file() or (stem / "__main__.py").is_file(), module


# ---- pages


def links(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, NOTEBOOK], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_resolves(path):
    for link in links(path):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {link}"


def test_messages_and_comments_name_pages_that_exist():
    for path in (*(ROOT / "ditjax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")):
        for name in re.findall(r"docs/[\w/]+\.md", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path} names {name}"


def test_the_readme_is_short_and_trains_at_once():
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= README_LINES
    first = next(line for line, _, text in fences(readme) if "ditjax train" in text)
    assert first <= TRAIN_WITHIN


def test_the_index_lists_every_page_and_command():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    pages = set((ROOT / "docs").glob("*.md")) | set((ROOT / "docs").glob("*.ipynb")) - {index}
    assert pages - {index} <= linked
    notes = ROOT / "docs" / "notes"
    listed = {notes / link for link in links(notes / "README.md")}
    assert set(notes.glob("*.md")) - {notes / "README.md"} <= listed
    text = index.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in COMMANDS)


# ---- what pages name


def rows(page: str) -> Iterator[list[str]]:
    """The cells of each row of the tables of a page."""
    for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("| `") or (line.startswith("| ") and "`" in line):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_equations_name_functions_that_exist():
    names = [name for row in rows("equations.md") for name in re.findall(r"`([\w.]+)`", row[2])]
    assert len(names) > 25
    for name in names:
        parts = f"ditjax.{name}".split(".")
        for k in range(len(parts), 0, -1):
            try:
                found: Any = importlib.import_module(".".join(parts[:k]))
            except ModuleNotFoundError:
                continue
            for part in parts[k:]:
                found = getattr(found, part)
            assert inspect.ismodule(found) or callable(found) or found, name
            break


def test_the_page_of_keys_is_the_schema():
    written = {row[0].strip("`"): _value(row[1].strip("`")) for row in rows("keys.md")}
    actual = dict(rundir.leaves(config.as_tree(config.schema("diffusion")())))
    assert written == actual


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def test_the_page_of_recipes_lists_those_that_ship():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(re.search(rf"`{name}[:`]", text) for name in recipes.list_recipes())


def test_the_recipe_that_the_manual_writes_is_legal(tmp_path):
    page = ROOT / "docs" / "recipes.md"
    (source,) = [text for _, language, text in fences(page) if language == "python"]
    path = tmp_path / "mine.py"
    path.write_text(source, encoding="utf-8")
    check_command(["train", f"--config={path}:S/8", "--workdir=x"])


def test_python_in_pages_and_in_the_notebook_is_python():
    for path in PAGES:
        for _, language, text in fences(path):
            if language == "python":
                ast.parse(text)
    for _, source in code_cells():
        ast.parse(source)


def test_the_notebook_is_whole_and_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert not any(cell.get("outputs") for cell in notebook["cells"])
