"""What a recipe's grid, lists, zips, seeds and budget make: every cell, its name, its cost."""

import itertools
import json
import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditjax.cli import load_recipe
from ditjax.config import migrated, read
from ditjax.errors import UserError
from ditjax.runs import rundir
from ditjax.studies.cells import (
    Cell,
    by_work,
    cells,
    check_result,
    check_same_study,
    select_cells,
    study_record,
)
from ditjax.tasks import cost_of

DIGITS = load_recipe(["--config=experiments/digits.py:1x32x2/4"])
NINE = (("model.size", ("1x32x2", "2x32x2", "3x64x2")), ("model.patch", (4, 2, 1)))


def of(recipe=DIGITS, **sweep):
    return cells({**recipe, "sweep": {**recipe["sweep"], "grid": (), **sweep}})


def with_train(**values):
    return {**DIGITS, "train": {**DIGITS["train"], **values}}


def test_cells_of_the_demo_keep_their_names():
    study = cells(load_recipe(["--config=experiments/digits.py"]))
    assert [cell.name for cell in study] == [
        f"DiT-{size}-p{patch}-seed0"
        for size in ("2x32x2", "3x64x2", "4x96x3")
        for patch in (4, 2, 1)
    ]
    assert [cell.number for cell in study] == list(range(9))
    assert study[-1].config.model.patch == 1
    assert study[-1].model == "DiT-4x96x3/1"
    assert read(study[0].recipe) == study[0].config
    assert not any(study[0].recipe["sweep"].values()), "a cell is one run"


def test_other_axes_are_in_the_name():
    study = of(grid=(("optim.learning_rate", (1e-3, 2e-3)), ("seed", (0, 1))))
    assert [cell.name for cell in study] == [
        f"DiT-1x32x2-p4-seed{seed}-learning_rate_{rate}"
        for rate in (0.001, 0.002)
        for seed in (0, 1)
    ]
    assert [cell.config.optim.learning_rate for cell in study] == [1e-3, 1e-3, 2e-3, 2e-3]


def test_lists_and_zips_and_seeds():
    study = of(
        grid=(("model.patch", (4, 8)),),
        lists=((), (("model.block", "adaln"), ("diffusion.prediction", "v"))),
        zips=((("model.size", ("1x32x2", "2x32x2")), ("optim.learning_rate", (2e-3, 1e-3))),),
        seeds=(3, 5),
    )
    assert len(study) == 2 * 2 * 2 * 2
    assert [cell.config.seed for cell in study[:4]] == [3, 5, 3, 5]
    assert study[4].name == ("DiT-1x32x2-p4-seed3-block_adaln-prediction_v-learning_rate_0.002")
    assert {(c.config.model.size, c.config.optim.learning_rate) for c in study} == {
        ("1x32x2", 2e-3),
        ("2x32x2", 1e-3),
    }
    assert study[4].overrides == (
        ("model.patch", 4),
        ("model.block", "adaln"),
        ("diffusion.prediction", "v"),
        ("model.size", "1x32x2"),
        ("optim.learning_rate", 2e-3),
        ("seed", 3),
    )


FREE = {
    "model.patch": (8, 4, 2, 1),
    "model.mlp_ratio": (1.0, 2.0, 4.0),
    "optim.b1": (0.8, 0.9),
    "diffusion.prediction": ("eps", "v", "x0"),
    "train.batch_size": (8, 16),
    "sample.eta": (0, 1),
}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_study_is_the_product_of_its_parts_in_their_order(data):
    keys = data.draw(st.permutations(list(FREE)))
    values = {
        key: data.draw(st.lists(st.sampled_from(FREE[key]), min_size=1, unique=True))
        for key in keys
    }
    grid = [(key, tuple(values[key])) for key in keys[:2]]
    length = min(len(values[key]) for key in keys[2:4])
    together = tuple((key, tuple(values[key][:length])) for key in keys[2:4])
    runs = [((keys[4], value), (keys[5], values[keys[5]][0])) for value in values[keys[4]]]
    seeds = data.draw(st.lists(st.integers(0, 9), max_size=2, unique=True))
    study = of(grid=tuple(grid), lists=tuple(runs), zips=(together,), seeds=tuple(seeds))
    expected = [
        dict(
            [
                *zip([key for key, _ in grid], point, strict=True),
                *run,
                *((key, of_key[i]) for key, of_key in together),
                ("seed", seed),
            ]
        )
        for point in itertools.product(*(axis for _, axis in grid))
        for run in runs
        for i in range(length)
        for seed in seeds or [0]
    ]
    assert [{"seed": 0, **dict(cell.overrides)} for cell in study] == expected
    for cell, overrides in zip(study, expected, strict=True):
        for key, value in overrides.items():
            node = cell.config
            for part in key.split("."):
                node = getattr(node, part)
            assert node == value
    assert len({cell.name for cell in study}) == len(study)
    assert all(rundir.legal_name(cell.name) == cell.name for cell in study)


def test_names_are_apart():
    # Two keys of one last part, in runs that are told one by one.
    runs = (
        (("optim.schedule", "cosine"),),
        (("diffusion.schedule", "cosine"),),
        (("optim.schedule", "constant"),),
    )
    with pytest.raises(UserError, match=r"cells 0 .* and 1 \(optim.schedule=.cosine.\) are"):
        of(lists=((), *runs))  # the recipe's own is cosine
    assert [cell.name.partition("seed0-")[2] for cell in of(lists=runs)] == [
        "optim.schedule_cosine",
        "diffusion.schedule_cosine",
        "optim.schedule_constant",
    ]
    # The same in a grid are told apart by their order, as they always were.
    grid = (("optim.schedule", ("cosine",)), ("diffusion.schedule", ("linear",)))
    assert of(grid=grid)[0].name == "DiT-1x32x2-p4-seed0-schedule_cosine-schedule_linear"
    # What a directory's name cannot hold.
    paths = of(grid=(("autoencoder.path", ("a/b", "a_b", "c")),))
    assert len({cell.name for cell in paths}) == 3
    assert paths[2].name == "DiT-1x32x2-p4-seed0-path_c"
    long = of(grid=(("autoencoder.path", ("a" * 200, "a" * 200 + "b")),))
    assert len({cell.name for cell in long}) == 2
    for cell in (*paths, *long):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", cell.name)


def test_budgets_make_the_steps_of_each_cell():
    recipe = with_train(batch_size=16)
    for budget, steps in (
        (("steps", 300), {300}),
        (("images", 6400), {400}),
        (("images", 6408), {400}),  # 400.5: to the even one
        (("images", 6409), {401}),
    ):
        assert {c.config.train.steps for c in of(recipe, grid=NINE, budget=budget)} == steps
    study = of(recipe, grid=NINE, budget=("gflops", 100.0))
    for cell in study:
        a_step = 3 * cost_of(cell.config).macs * 16 / 1e9
        assert abs(cell.config.train.steps * a_step - 100) <= a_step / 2
        assert cell.training_gflops == pytest.approx(100, abs=a_step / 2)
        assert cell.recipe["train"]["steps"] == cell.config.train.steps
    assert len({cell.config.train.steps for cell in study}) == 9
    assert study[0].name == "DiT-1x32x2-p4-seed0-gflops_100"
    assert of(recipe, grid=NINE, budget=("gflops", 1e6))[0].name.endswith("-gflops_1e6")
    batches = (("train.batch_size", (16, 32)),)
    assert [c.config.train.steps for c in of(grid=batches, budget=("images", 6400))] == [400, 200]


def test_a_budget_that_no_cell_can_have():
    for budget, match in (
        (("images", 7), r"cell 0 \(seed=0\): config.sweep.budget is .*one step takes 16 images"),
        (("gflops", 1e-6), r"one step takes .* gflops: raise it"),
        (("images", 16 * 100), "warmup_steps is 100 and config.train.steps is 100"),
        (("steps", 2**40), "at most 2147483647"),
    ):
        with pytest.raises(UserError, match=match):
            of(seeds=(0,), budget=budget)
    auto = {
        "task": "autoencoder",
        "data": DIGITS["data"],
        "autoencoder": {"multipliers": (1, 2)},
        "sweep": {},
    }
    with pytest.raises(UserError, match=r"KL autoencoder .*, is not known in closed form"):
        of(auto, seeds=(0,), budget=("gflops", 1e6))


def test_a_study_that_is_none():
    for sweep, match in (
        ({}, r"config\.sweep is empty: .*use ditjax\.train"),
        ({"budget": ("steps", 200)}, "is empty"),
        ({"grid": (("model.patch", (4, 3)),)}, r"cell 1 \(model\.patch=3\): .*patch is 3"),
        ({"lists": ((("model.patch", 4),), ())}, r"cells 0 .* and 1 \(the recipe as it is\) are"),
    ):
        with pytest.raises(UserError, match=match):
            of(**sweep)


def test_cells_are_picked_by_model_and_number():
    study = of(grid=NINE, seeds=(0, 1))
    picked = select_cells(study, models="1x32x2/4, DiT-3x64x2/1")
    assert [cell.number for cell in picked] == [0, 1, 16, 17]
    assert [cell.number for cell in select_cells(study, numbers="0,3-5,4")] == [0, 3, 4, 5]
    assert [c.number for c in select_cells(study, models="1x32x2/4", numbers="1-9")] == [1]
    assert select_cells(study) == study
    for flags, match in (
        (
            {"models": "1x32x2/3"},
            r"Did you mean '1x32x2/[1248]'\? Its models: 1x32x2/4, ",
        ),
        ({"models": ",1x32x2/4"}, "no cell of this study has that model"),
        ({"numbers": "18"}, "--cells=18: the study has cells 0 to 17"),
        ({"numbers": "5-3"}, "ranges such as 0,3-5"),
        ({"numbers": "-1"}, "ranges such as"),
        ({"numbers": "٣"}, "ranges such as"),
        ({"models": "1x32x2/4", "numbers": "5"}, "no cell matches both"),
        ({"shard": "4/4"}, r"--shard=4/4: expected K/N, .* from 0"),
        ({"shard": "1"}, "expected K/N"),
        ({"shard": "0/0"}, "expected K/N"),
    ):
        with pytest.raises(UserError, match=match):
            select_cells(study, **flags)


@pytest.mark.parametrize("parts", [1, 2, 5, 30])
def test_shards_are_disjoint_and_all_of_it(parts):
    study = of(grid=NINE, seeds=(0, 1))
    shards = [select_cells(study, shard=f"{k}/{parts}") for k in range(parts)]
    assert Counter(cell.name for shard in shards for cell in shard) == Counter(
        cell.name for cell in study
    )
    order = by_work(study)
    for k, shard in enumerate(shards):
        assert [cell.number for cell in shard] == sorted(c.number for c in order[k::parts])
    if parts == 2:
        works = [sum(cell.training_gflops for cell in shard) for shard in shards]
        assert works[0] == pytest.approx(works[1], rel=1e-9), "a seed of each model in each"


def test_the_record_of_a_study():
    study = of(grid=NINE, budget=("steps", 500))
    said = json.loads(json.dumps(study_record(DIGITS, study, "a command")))
    assert (said["schema"], said["title"], said["command"]) == (1, "", "a command")
    assert said["cells"][1] == {
        "number": 1,
        "name": "DiT-1x32x2-p2-seed0-steps_500",
        "model": "DiT-1x32x2/2",
        "overrides": {"model.size": "1x32x2", "model.patch": 2},
        "params": study[1].params,
        "gflops": study[1].gflops,
        "training_gflops": study[1].training_gflops,
        "published": None,
    }
    assert study[1].training_gflops == pytest.approx(3 * study[1].gflops * 16 * 500)


def test_a_study_may_grow_and_not_change(tmp_path):
    old = json.loads(json.dumps({**DIGITS, "sweep": {"grid": NINE}}))
    recorded = migrated(old)

    def check(recipe, **sweep):
        check_same_study(tmp_path, recorded, recipe, of(recipe, **sweep))

    check(DIGITS, grid=(*NINE, ("optim.learning_rate", (1e-3,))))
    check(
        {**DIGITS, "optim": {**DIGITS["optim"], "learning_rate": 1.0}},
        grid=(("optim.learning_rate", (1e-3,)),),
    )
    check({**DIGITS, "seed": 3}, grid=NINE)
    with pytest.raises(UserError, match=r"holds a study with train.steps=4000, .* says 9000"):
        check(with_train(steps=9000), grid=NINE)  # of a cosine that ends at 4,000
    constant = {"optim": {**DIGITS["optim"], "schedule": "constant"}}
    recorded = migrated({**old, **constant})
    check({**with_train(steps=9000), **constant}, grid=NINE)
    recorded = migrated(old)
    with pytest.raises(UserError, match=r"holds a study with train.batch_size=16, .* says 32"):
        check(with_train(batch_size=32), grid=NINE)


def test_a_result_of_other_steps_is_another_cells(tmp_path):
    (cell,) = of(seeds=(0,))
    check_result(cell, tmp_path, {"config": cell.recipe})
    more = Cell(0, cell.name, with_train(steps=9000), cell.config)
    with pytest.raises(UserError, match=r"train\.steps=4000, but this command has 9000"):
        check_result(more, tmp_path, {"config": cell.recipe})
