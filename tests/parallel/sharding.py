"""Makes tests/goldens/sharding.txt again: python -m tests.parallel.sharding

Where every parameter of a large model lives on its mesh, from shapes alone. Averages and moments
follow their parameter.
"""

from pathlib import Path

import jax
from jax.sharding import AbstractMesh

from ditjax.cli import load_recipe
from ditjax.config import read
from ditjax.parallel import rules
from ditjax.parallel.mesh import MESH_AXES
from ditjax.tasks import make_task

FILE = Path(__file__).parent.parent / "goldens" / "sharding.txt"
# Recipe, and the sizes of its mesh in the order of MESH_AXES.
MODELS = (
    ("base.py:S,2", (8, 1, 1, 1)),
    ("base.py:B,2", (2, 4, 1, 1)),
    ("base.py:L,2", (1, 8, 2, 1)),
    ("base.py:XL,2", (16, 16, 1, 1)),
    ("dit_3b.py", (4, 16, 1, 4)),
    ("dit_7b.py", (2, 32, 2, 8)),
)


def table(recipe: str, sizes: tuple[int, ...]) -> list[str]:
    """Lines of path, shape, spec and a device's share; a last one of the totals."""
    name, _, model = recipe.partition(":")
    overrides = []
    if model:
        size, patch = model.split(",")
        overrides = [f"--config.model.size={size}", f"--config.model.patch={patch}"]
    c = read(load_recipe([f"--config=experiments/{name}", *overrides]))
    mesh = AbstractMesh(sizes, MESH_AXES)
    task = make_task(c)
    params = jax.eval_shape(task.init, jax.random.key(0))
    rules.check_split(params, mesh, task.rules)
    lines, total, held = [], 0, 0
    shardings = jax.tree.leaves(rules.state_shardings(params, mesh, task.rules))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), sharding in zip(leaves, shardings, strict=True):
        share = sharding.shard_shape(leaf.shape)
        lines.append(f"{rules.path_of(path)} {leaf.shape} {tuple(sharding.spec)} {share}")
        total, held = total + leaf.size, held + jax.ShapeDtypeStruct(share, leaf.dtype).size
    return [*lines, f"{total:,} parameters, {held:,} on a device"]


def text() -> str:
    """The whole file."""
    parts = []
    for recipe, sizes in MODELS:
        mesh = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        parts.append("\n".join((f"# {recipe} on {mesh}", *table(recipe, sizes))))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"{FILE.name}: {len(text().splitlines())} lines")
