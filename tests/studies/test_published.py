"""Published figures in a recipe: read, refused in one line, and given to the cells they are of."""

import copy

import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, migrated, read
from ditjax.errors import UserError
from ditjax.studies.published import published_of

RECIPE = load_recipe(["--config=experiments/digits.py"])
OF_DIGITS = (("image_size", "8"), ("num_classes", "10"))
A = ((("model.size", "2x32x2"), ("model.patch", 4)), "fd_digits", 5)
B = ((("model.patch", 2),), "fd_digits", 7.5)


def with_figures(*figures, protocol=OF_DIGITS, source="a book"):
    recipe = copy.deepcopy(RECIPE)
    recipe["sweep"] |= {
        "published": figures,
        "published_protocol": protocol,
        "published_source": source,
    }
    return recipe


def cell_of(study, **changes):
    return changed(study, changes | {"sweep": {"published": ()}})


def test_a_figure_is_given_to_the_cells_with_its_keys():
    study = read(with_figures(A, B, (B[0], "accuracy", 0.5)))
    assert study.sweep.published[0] == (A[0], "fd_digits", 5.0)
    four = cell_of(study, model={"size": "2x32x2", "patch": 4}, seed=7)
    assert published_of(study, four) == {
        "values": {"fd_digits": 5.0},
        "protocol": dict(OF_DIGITS),
        "source": "a book",
    }
    two = published_of(study, cell_of(study, model={"patch": 2}))
    assert two
    assert two["values"] == {"fd_digits": 7.5, "accuracy": 0.5}
    assert published_of(study, cell_of(study, model={"size": "4x96x3", "patch": 4})) is None


def test_two_figures_of_one_cell_are_refused():
    study = read(with_figures(A, ((("model.patch", 4),), "fd_digits", 6.0)))
    with pytest.raises(UserError, match=r"fd_digits 5 and 6 for the cells with model\.patch=4"):
        published_of(study, cell_of(study, model={"size": "2x32x2", "patch": 4}))


KEYS = (("model.patch", 4),)


@pytest.mark.parametrize(
    ("figures", "match"),
    [
        (("fid",), "holds 'fid': expected"),
        (((KEYS, "fid"),), "expected"),
        (((("model.patch", 4), "fid", 1.0),), "expected"),
        ((((("model.patches", 4),), "fid", 1.0),), "Did you mean 'model.patch'"),
        ((((("sweep.title", "x"),), "fid", 1.0),), "expected a key of a recipe"),
        ((((("model.patch", 0),), "fid", 1.0),), "model.patch is 0"),
        ((((*KEYS, *KEYS), "fid", 1.0),), "a key appears twice"),
        (((KEYS, 3, 1.0),), "expected a string"),
        (((KEYS, "fid", "low"),), "expected a number"),
        (((KEYS, "fid", 0.0),), "above 0"),
        (((KEYS, "fid", 1.0), (KEYS, "fid", 2.0)), "two figures of one metric"),
        (((((["model.patch"], 4),), "fid", 1.0),), "expected"),
    ],
)
def test_figures_that_are_none(figures, match):
    with pytest.raises(UserError, match=match) as error:
        read(with_figures(*figures))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"protocol": ()}, "is for image_size not stated"),
        ({"protocol": (("image_size", "256"), ("num_classes", "10"))}, "data.image_size is 8"),
        ({"protocol": (("image_size", "8"), ("num_classes", "1000"))}, "data.num_classes is 10"),
        ({"protocol": (*OF_DIGITS, *OF_DIGITS)}, "a field appears twice"),
        ({"protocol": (("image_size", 8),)}, "expected a string"),
        ({"protocol": ("image_size",)}, "expected pairs"),
        ({"source": ""}, "published_source is empty"),
    ],
)
def test_a_protocol_that_does_not_hold(changes, match):
    with pytest.raises(UserError, match=match) as error:
        read(with_figures(A, **changes))
    assert "\n" not in str(error.value)


def test_recipes_from_before_have_none():
    old = copy.deepcopy(RECIPE)
    old["sweep"] = {"grid": ()}
    assert read(migrated(old)).sweep.published == ()


def test_figures_are_emptied_on_the_command_line():
    words = ["--config=experiments/paper/table4.py", "--config.sweep.published=()"]
    assert read(load_recipe(words)).sweep.published == ()
