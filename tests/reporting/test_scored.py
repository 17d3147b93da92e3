"""Measured and published figures: verdicts, noise, and every difference by name."""

import copy
import csv
import io
from typing import Any

import pytest

from ditjax.config import completed
from ditjax.files.atomic import protocol_hash
from ditjax.reporting import scored
from ditjax.reporting.scored import scored_csv, scored_rows, scored_text
from experiments.paper import published
from tests.runs.test_results import a_result

PAPER = completed({})

PROTOCOL = {
    "metric": "FID",
    "features": "FID's Inception (2015)",
    "reference_sha256": "ab",
    "reference_features": 10_000,
    "num_samples": 50_000,
    "labels": "uniform",
    "seed": 0,
    "sampler": "ddpm",
    "steps": "250",
    "eta": None,
    "cfg_scale": 1.0,
    "cfg_channels": None,
    "clip_x0": False,
    "weights": "ema",
    "ema_decay": 0.9999,
    "decoder": "c0ffee" * 8,
    "image_size": 256,
    "sampling_precision": ["bfloat16", "default"],
}
CONFIG: dict[str, Any] = {
    "seed": 0,
    "model": PAPER["model"] | {"size": "B", "patch": 4, "dtype": "bfloat16"},
    "diffusion": PAPER["diffusion"],
    "optim": PAPER["optim"],
    "data": {"name": "imagenet2012", "image_size": 256, "num_classes": 1000, "flip": True},
    "autoencoder": {"path": "/share/vae-ft-mse-840000-ema-pruned.ckpt"},
    "evaluate": {"reference": "/share/VIRTUAL_imagenet256_labeled.npz"},
}
PUBLISHED: dict[str, Any] = {
    "values": {"fid": 68.38},
    "protocol": dict(published.protocol()),
    "source": "arXiv 2212.09748, table 4",
}
ALWAYS = {"precision: ours bfloat16, published not stated", "seed: ours 0, published not stated"}


def run(fid=68.0, seed=0, name="DiT-B-p4", told=PUBLISHED, **changes):
    """A result of the paper's protocol; changes as section__key."""
    result = a_result(
        run=f"{name}-seed{seed}",
        metrics={"fid": fid},
        protocol=copy.deepcopy(PROTOCOL),
        config=copy.deepcopy(CONFIG) | {"seed": seed},
        published=told,
    )
    result["train"] |= {"steps": 400_000, "batch_size": 256, "learning_rate": 1e-4, "seed": seed}
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        node = result["config"] if section in result["config"] else result
        node[section] |= {leaf: value}
    result["protocol_hash"] = protocol_hash(result["protocol"])
    return result


def study(*seeds, name="DiT-B-p4", told=PUBLISHED):
    return {
        "schema": 1,
        "cells": [
            {
                "number": i,
                "name": f"{name}-seed{seed}",
                "published": told,
                "overrides": {"model.size": "B", "model.patch": 4, "seed": seed},
            }
            for i, seed in enumerate(seeds)
        ],
    }


def one(*results, of=None):
    (row,) = scored_rows(results, of)
    return row


def test_the_papers_protocol_leaves_only_what_it_does_not_state():
    row = one(run())
    assert set(row.differences) == ALWAYS
    assert row.decisive == 0
    assert (row.cell, row.metric, row.published, row.measured) == ("DiT-B-p4", "fid", 68.38, 68.0)
    assert row.difference == pytest.approx(-0.38)
    assert row.source == "arXiv 2212.09748, table 4"


def test_two_protocols_of_one_cell_are_rows_of_their_own():
    short, long = run(), run(metrics__fid=60.0, protocol__num_samples=10_000)
    rows = scored_rows([short, long], study(0))
    assert [(row.measured, row.runs, row.verdict) for row in rows] == [
        (68.0, 1, "inside"),
        (60.0, 1, "not comparable"),
    ]
    assert [row.cell for row in rows] == [
        f"DiT-B-p4 ({each['protocol_hash']})" for each in (short, long)
    ]


# Every field of a published protocol: ours of another value is named, and decides or does not.
@pytest.mark.parametrize(
    ("changes", "words", "decides"),
    [
        ({"protocol__metric": "FD-digits"}, "metric: ours FD-digits, published FID", True),
        ({"protocol__features": "digits_convnet"}, "features: ours digits_convnet", True),
        ({"evaluate__reference": "mine.npz"}, "reference: ours mine.npz, published VIRT", True),
        ({"evaluate__reference": ""}, "reference: ours not on record", False),
        ({"data__name": "cifar10"}, "data: ours cifar10, published imagenet2012", True),
        ({"data__name": "latents:/x"}, "data: ours not on record", False),
        ({"data__image_size": 64}, "image size: ours 64, published 256", True),
        ({"data__num_classes": 10}, "num classes: ours 10, published 1000", True),
        ({"data__flip": False}, "flip: ours False, published True", True),
        ({"protocol__num_samples": 10_000}, "num samples: ours 10000, published 50000", True),
        ({"protocol__sampler": "ddim"}, "sampler: ours ddim, published ddpm", True),
        ({"protocol__steps": "50"}, "sampling steps: ours 50, published 250", True),
        ({"protocol__cfg_scale": 1.5}, "cfg scale: ours 1.5, published 1", True),
        ({"protocol__cfg_channels": "all"}, "cfg channels: ours all, published three", True),
        ({"protocol__weights": "model"}, "weights: ours model, published ema", True),
        ({"protocol__ema_decay": 0.999}, "ema decay: ours 0.999, published 0.9999", True),
        ({"train__steps": 1000}, "steps: ours 1000, published 400000", True),
        ({"train__batch_size": 64}, "batch size: ours 64, published 256", True),
        ({"train__learning_rate": 3e-4}, "learning rate: ours 0.0003, published 0.0001", True),
        ({"optim__b2": 0.99}, "recipe: ours optim.b2 0.99, published the paper's", True),
        (
            {"diffusion__prediction": "v", "diffusion__schedule": "cosine"},
            "recipe: ours diffusion.schedule cosine, diffusion.prediction v, published the",
            True,
        ),
        ({"model__mlp_ratio": 2.0}, "recipe: ours model.mlp_ratio 2, published", True),
        ({"protocol__labels": "balanced"}, "labels: ours balanced, published uniform", False),
        ({"autoencoder__path": "x/ft-EMA.ckpt"}, "decoder: ours ft-EMA, published ft-MSE", False),
        ({"autoencoder__path": "kl-f8"}, "decoder: ours original, published ft-MSE", False),
        ({"autoencoder__path": "mine"}, "decoder: ours unknown, SHA-256 c0ffeec0f...", False),
        ({"protocol__decoder": "pixels"}, "decoder: ours pixels, published ft-MSE", False),
        ({"model__dtype": "float32"}, "precision: ours float32, default products", False),
    ],
)
def test_a_difference_is_named(changes, words, decides):
    row = one(run(**changes))
    more = [each for each in row.differences if each not in ALWAYS]
    assert len(more) == 1
    assert more[0].startswith(words)
    assert row.decisive == decides
    assert row.verdict == ("not comparable" if decides else "inside")
    assert (row.difference is None) == decides
    assert words in scored_text([row])


def test_every_known_field_is_in_a_published_protocol():
    assert scored.FIELDS.keys() == dict(published.protocol()).keys()
    assert scored.NOT_STATED == published.NOT_STATED


def test_a_recipe_that_lacks_a_later_key_is_the_papers():
    result = run()
    del result["config"]["model"]["norm2_eps"]
    assert one(result).decisive == 0
    del result["config"]["optim"]
    assert "recipe: ours not on record, published the paper's" in one(result).differences


def test_a_field_that_is_not_known_is_named():
    told = PUBLISHED | {"protocol": PUBLISHED["protocol"] | {"moon": "full"}}
    assert "moon: full, not compared" in one(run(told=told)).differences


def test_the_references_features_affect_precision_and_recall_only():
    told = PUBLISHED | {"values": {"fid": 68.38, "recall": 0.5}}
    result = run(told=told, protocol__reference_features=1000)
    result["metrics"]["recall"] = 0.52
    fid, recall = scored_rows([result])
    assert fid.verdict == "inside"
    assert recall.verdict == "not comparable"
    assert "reference features: ours 1000, published 10000" in recall.differences


def test_one_run_is_judged_by_published_repeats():
    # s = .03004 of three degrees of freedom, t = 3.1824, two runs: a factor of 1.1448.
    row = one(run(fid=75.0))
    assert row.high == pytest.approx(68.38 * 1.1448, rel=1e-4)
    assert row.noise == scored.PUBLISHED_SEEDS
    assert row.verdict == "inside"
    assert one(run(fid=80.0)).verdict == "outside"
    assert one(run(fid=55.0)).verdict == "outside"


def test_own_seeds_are_judged_by_their_own_spread():
    rows = scored_rows([run(70.0, 0), run(70.2, 1), run(69.9, 2)])
    (row,) = rows
    assert row.runs == 3
    assert row.measured == pytest.approx(70.0333, abs=1e-3)
    assert row.noise == "our own seeds, 3"
    assert row.verdict == "outside", "1.6 above by seeds that differ by .15"
    assert one(run(66.0, 0), run(70.9, 1)).verdict == "inside"
    assert "outside, 3 seeds" in scored_text(rows)


def test_without_known_seeds_the_noise_is_unknown():
    told = PUBLISHED | {"values": {"sfid": 8.0}}
    result = run(told=told)
    result["metrics"]["sfid"] = 8.1
    row = one(result)
    assert (row.verdict, row.low, row.noise) == ("noise unknown", None, "")
    assert row.difference == pytest.approx(0.1)
    for field, text in (("steps", "7000000"), ("cfg_scale", "1.5"), ("num_samples", "10000")):
        told = PUBLISHED | {"protocol": PUBLISHED["protocol"] | {field: text}}
        key = {"steps": "train__steps"}.get(field, f"protocol__{field}")
        assert one(run(told=told, **{key: int(text) if "." not in text else 1.5})).low is None


def test_what_was_not_run_stays_not_run():
    row = one(of=study(0))
    assert (row.verdict, row.measured, row.runs, row.difference) == ("not run", None, 0, None)
    assert row.differences == ()
    text = scored_text([row])
    assert text.splitlines()[2].split() == ["DiT-B-p4", "FID", "68.38", "-", "-", "-", "not", "run"]
    assert next(csv.DictReader(io.StringIO(scored_csv([row]))))["measured"] == ""


def test_a_study_counts_the_seeds_that_ran():
    row = one(run(70.0, 0), of=study(0, 1, 2))
    assert (row.cell, row.runs, row.measured) == ("DiT-B-p4", 1, 70.0)
    both = one(run(70.0, 0), run(72.0, 2), of=study(0, 1, 2))
    assert (both.runs, both.measured) == (2, 71.0)
    # A result that the study does not list has a row of its own.
    other = run(10.0, name="DiT-XL-p2", model__size="XL")
    assert [row.cell for row in scored_rows([run(), other], study(0))] == ["DiT-B-p4", "DiT-XL-p2"]


def test_cells_that_differ_in_more_than_the_seed_are_apart():
    other = run(20.0, 0, name="DiT-B-p2", model__patch=2)
    assert len(scored_rows([run(), other])) == 2
    assert scored_rows([run(told=None)]) == []
    assert scored_rows([], {"cells": [{"name": "x", "published": None}]}) == []


def test_a_missing_value_is_never_averaged_in():
    row = one(run(float("nan"), 0), run(70.0, 1))
    assert (row.measured, row.runs) == (70.0, 1)
    assert "1 run gave no finite value and is left out" in row.differences
    assert one(run(float("nan"))).verdict == "not finite"
    missing = run()
    del missing["metrics"]["fid"]
    missing["metrics"]["fd_digits"] = 3.0
    row = one(missing)
    assert (row.verdict, row.measured) == ("not measured", None)


@pytest.mark.parametrize(
    "told", [3, {}, {"values": {"fid": "low"}, "protocol": {}, "source": ""}, {"values": 1}]
)
def test_damaged_figures_are_no_figures(told):
    assert scored_rows([run(told=told)]) == []


def test_a_difference_of_all_is_listed_once():
    rows = scored_rows([run(), run(20.0, name="DiT-B-p2", model__patch=2, train__steps=5)])
    text = scored_text(rows)
    assert text.count("precision: ours bfloat16, published not stated (all)") == 1
    assert "steps: ours 5, published 400000 (DiT-B-p2)" in text
    assert scored_text([]) == ""


def test_the_csv_holds_every_digit():
    row = next(csv.DictReader(io.StringIO(scored_csv(scored_rows([run(68.123456789)])))))
    assert float(row["measured"]) == 68.123456789
    assert row["published"] == "68.38"
    assert "precision: ours bfloat16" in row["differences"]
