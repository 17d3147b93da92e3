"""No secret is written down, and no name steers a terminal."""

import json
import logging

import pytest

from ditjax import cli
from ditjax.cli import load_recipe
from ditjax.errors import UserError, one_line, printable
from ditjax.files.atomic import write_json, write_text
from ditjax.files.masking import masked, masked_tree
from ditjax.files.npz import provenance_text
from ditjax.runs import rundir
from ditjax.runs.log import MetricsLog

# In pieces: what searches this repository for secrets finds none. In a URL, by its looks, and known
# from the environment alone.
SECRETS = ("pass" + "word0815", "hf_" + "Kx7" * 11, "w0rds+of/the" + "=envir0nment")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"/data/{SECRETS[1]}/digits", "/data/***/digits"),
        ("AKIA" + "ABCDEFGH23456789 is in it", "*** is in it"),
        ("ghp_" + "a1B2" * 9, "***"),
        ("eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2ln", "***"),
        (f"cannot open https://me:{SECRETS[0]}@host/x?a=1", "cannot open https://***@host/x?a=1"),
        ("https://host/x?X-Amz-Signature=abc&b=2", "https://host/x?X-Amz-Signature=***&b=2"),
        ("--api_key=abc --seed=1", "--api_key=*** --seed=1"),
        ("{'token': 'abcdefg1', 'n': 2}", "{'token': '***', 'n': 2}"),
        ("PASSWORD: hunter22", "PASSWORD: ***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\n.", "***\n."),
    ],
)
def test_what_looks_like_a_secret(text, shown):
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "sha256 " + "0123456789abcdef" * 4,
        "16 tokens: N = 16",
        "tokens=16",
        "token: expected one",
        "https://host:80/a@b",
        "/home/me/runs/DiT-4x96x3-p1-seed0",
        "latents:/data/hf_cache",
        "gs://bucket/run@2",
        "me@host",
        "",
    ],
)
def test_what_does_not(text):
    assert masked(text) == text


def test_values_of_secret_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", SECRETS[2])
    monkeypatch.setenv("LONGER_SECRET", SECRETS[2] + "more1")
    assert masked(f"a {SECRETS[2]}more1 b {SECRETS[2]}") == "a *** b ***"
    for name, value in (
        ("PUBLIC_THING", SECRETS[2]),
        ("A_KEY", "training"),
        ("B_KEY", "1"),
        ("C_CREDENTIALS", str(tmp_path)),
    ):
        monkeypatch.delenv("SOME_SERVICE_TOKEN", raising=False)
        monkeypatch.delenv("LONGER_SECRET", raising=False)
        monkeypatch.setenv(name, value)
        assert masked(f"x {value} y") == f"x {value} y"


def test_nested_data_keep_their_shape():
    tree = {"a": ("x", 1, None, 2.5, [SECRETS[1]]), SECRETS[1]: {"b": True}}
    assert masked_tree(tree) == {"a": ("x", 1, None, 2.5, ["***"]), "***": {"b": True}}


@pytest.mark.parametrize("name", ["digits", "digits_latent", "imagenet256", "dit_7b"])
def test_recipes_are_written_as_they_are(name):
    recipe = load_recipe([f"--config=experiments/{name}.py"])
    assert masked_tree(recipe) == recipe


def test_a_recipe_with_a_secret_comes_in_again(tmp_path):
    recipe = {"data": {"name": f"x:{SECRETS[1]}", "sizes": (1, 2)}}
    rundir.open_directory(tmp_path, recipe)
    assert rundir.read_recipe(tmp_path) == {"data": {"name": "x:***", "sizes": [1, 2]}}
    rundir.open_directory(tmp_path, recipe)
    rundir.open_study(tmp_path / "study", recipe, {"command": SECRETS[1]})
    for name in ("config.json", "sweep.json"):
        assert SECRETS[1] not in (tmp_path / "study" / name).read_text()


def test_files_hold_none(tmp_path):
    write_json(tmp_path / "a.json", {"command": [f"--x={SECRETS[1]}", 1, {"a": (SECRETS[1],)}]})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "command": ["--x=***", 1, {"a": ["***"]}]
    }
    with MetricsLog(tmp_path, 0) as log:
        log.scalars(1, {"loss": 0.5, "words": SECRETS[1]})
    assert '"words": "***"' in (tmp_path / "metrics.jsonl").read_text()
    write_text(tmp_path / "a.txt", f"--x={SECRETS[1]}")
    assert (tmp_path / "a.txt").read_text() == "--x=***"
    assert SECRETS[1] not in str(provenance_text({"run": SECRETS[1]}))


def test_how_a_command_ends_tells_none(monkeypatch, capsys):
    monkeypatch.setattr("ditjax.parallel.host.keep_freed_memory", lambda: None)
    monkeypatch.setattr("ditjax.parallel.compilations.enable_cache", lambda: None)
    level = logging.getLogger("absl").level

    def main(_):
        raise RuntimeError(f"no {SECRETS[1]}\x1b[31m\nhere")

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "RuntimeError: no ***" in said
    assert SECRETS[1] not in said
    assert "\x1b" not in said

    def mistaken(_):
        raise UserError(f"no {SECRETS[1]}\x1b[31m\nhere \ud800")

    with pytest.raises(SystemExit) as ended:
        cli.run(mistaken)
    assert (ended.value.code, capsys.readouterr().err) == (
        2,
        r"error: no ***\x1b[31m here \ud800" "\n",
    )
    logging.getLogger("absl").setLevel(level)


def test_text_for_a_terminal():
    assert one_line(" a\n\tb \x1b[2J \u202ecod\x00 ü∞ ") == r"a b \x1b[2J \u202ecod\x00 ü∞"
    assert printable("a\nb\x07", keep="\n") == "a\nb?"
