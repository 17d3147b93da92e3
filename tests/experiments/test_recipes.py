"""Every shipped recipe: found by its name, legal, and no longer than what differs in it."""

import importlib
from types import ModuleType
from typing import Any

import pytest

from ditjax import recipes
from ditjax.cli import load_recipe
from ditjax.config import completed, read
from ditjax.runs.rundir import leaves

NAMES = recipes.list_recipes()
# Another argument, another recipe: of the names that take a word and not only a model.
ARGUMENTS = [
    *NAMES,
    "base:S/4",
    "digits_latent:autoencoder",
    "paper/decoders:original",
    "small/clip:shuffled",
    "small/process:fashion",
    "small/language:cost",
    "small/nowcast:first",
    "small/nowcast:advect:cost",
    "sevir_nowcast:first",
    "small/unet:rates",
    "pixart:512",
    "small/text2image:binding",
    "small/text2image:minilm",
    "small/text2image:shuffled",
    "small/dalle:dvae",
    "small/dalle:shuffled",
    "dalle_12b:dvae",
    "small/unclip:decoder",
    "small/unclip:x0",
    "small/recaption:captioner",
    "small/finetune:16",
    "small/finetune:32",
]
# The recipes of other tasks than diffusion.
TASKS = {
    "digits_latent:autoencoder": "autoencoder",
    **dict.fromkeys(("clip_b32", "small/clip", "small/clip:shuffled"), "clip"),
    **dict.fromkeys(("pixart", "pixart:512", "small/text2image"), "text2image"),
    **dict.fromkeys(
        (f"small/text2image:{each}" for each in ("binding", "minilm", "shuffled")), "text2image"
    ),
    **dict.fromkeys(("small/dalle:dvae", "dalle_12b:dvae"), "dvae"),
    **dict.fromkeys(("small/unclip", "small/unclip:x0"), "prior"),
    "small/unclip:decoder": "unclip",
    "small/recaption": "text2image",
    "small/recaption:captioner": "captioner",
    **dict.fromkeys(("dalle_12b", "small/dalle", "small/dalle:shuffled"), "tokens"),
}
# What an argument such as XL/2 says, whatever the paper's is.
OF_THE_ARGUMENT = {"model.size", "model.patch"}


def test_the_names_are_of_the_files():
    assert {"base", "digits", "imagenet256", "small/scaling", "paper/table4"} <= set(NAMES)
    assert not {"__init__", "small/__init__", "paper/published"} & set(NAMES)
    assert len(set(NAMES)) == len(NAMES) >= 20


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_recipe_is_loaded_by_its_name(name):
    """Whole and legal, the same as by its file."""
    word, found, arg = name.partition(":")
    tree = load_recipe([f"--config={name}"])
    assert tree == load_recipe([f"--config=experiments/{word}.py{found}{arg}"])
    assert tree == completed(recipes.build(name))
    c = read(tree)
    assert c.task == TASKS.get(name, "diffusion")
    assert read(recipes.build(name)) == c


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_recipe_states_only_what_differs(name):
    """A key that it names is not the default, unless a recipe that it is made of changed the key.

    So may the same file without the argument. An empty section says nothing.
    """
    stated = dict(leaves(recipes.build(name)))
    task = stated.pop("task", "diffusion")
    assert task == TASKS.get(name, "diffusion")
    kind = {"model": {"kind": stated["model.kind"]}} if "model.kind" in stated else {}
    of_network = dict(leaves(completed({"task": task, **kind})))
    defaults = {**of_network, **dict(leaves(completed({"task": task})))}
    word = name.partition(":")[0]
    module = importlib.import_module(f"ditjax.recipes.{word.replace('/', '.')}")
    changed = {key for each in (module, *made_of(module)) for key in differing(each)}
    same = {key for key, value in stated.items() if value == defaults[key]}
    assert same <= OF_THE_ARGUMENT | changed, "these are the defaults"
    assert len(stated) < len(defaults) / 2


def made_of(module: ModuleType) -> list[ModuleType]:
    """The recipes that a recipe's file imports, theirs included."""
    found = [each for each in vars(module).values() if hasattr(each, "get_config")]
    return [*found, *(deeper for each in found for deeper in made_of(each))]


def differing(module: ModuleType) -> list[str]:
    """The keys that a recipe changes."""
    tree: Any = module.get_config().to_dict()
    defaults = dict(leaves(completed({"task": tree.get("task", "diffusion")})))
    return [key for key, value in leaves(tree) if value != defaults.get(key)]
