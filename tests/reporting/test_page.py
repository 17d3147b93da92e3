"""The page: it needs no network, and hostile strings stay text, also in a real browser."""

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from ditjax import report


def test_an_unknown_backend_of_matplotlib_is_ignored():
    done = subprocess.run(
        [sys.executable, "-c", "import ditjax.reporting.style"],
        env={**os.environ, "MPLBACKEND": "nonsense"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "MPLBACKEND is 'nonsense', no backend of matplotlib: ignored\n"


def test_page_needs_no_network(nine, read_page):
    page = nine.page.read_text()
    for tag, attributes in read_page(page).tags:
        assert tag not in ("link", "iframe", "object", "embed")
        for key in ("src", "href", "srcset", "data", "action"):
            if attributes.get(key) is not None:
                inside = "#" if tag == "use" else "data:image/"  # a marker of the same page
                assert attributes[key].startswith(inside), (tag, key)
    assert not re.search(r"@import|url\((?!#)|https?://", page)
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


HOSTILE = '$\\frac{$"><script>alert(1)</script>\x1b[31m {{ 7*7 }} ' + "x" * 5000


def test_hostile_strings_stay_text(study, tmp_path, read_page):
    study.write(tmp_path)
    model = {"name": HOSTILE, "size": HOSTILE, "depth": 9, "width": 8, "heads": 1, "patch": 1}
    study.write_run(
        tmp_path,
        9,
        96,
        3,
        1,
        run=HOSTILE,
        model=model | {"block": HOSTILE, "tokens": 64},
        protocol={HOSTILE: HOSTILE, **study.protocol},
        environment={"command": HOSTILE, HOSTILE: [HOSTILE]},
        metrics={"fd_digits": 1.0, HOSTILE: 2.0},
    )
    summary = report.make_report([tmp_path], tmp_path / "report")
    page = summary.page.read_text()
    tags = read_page(page).tags
    assert sum(tag == "script" for tag, _ in tags) == 1
    assert "<script>alert" not in page
    assert "{{ 7*7 }}" in page
    assert not any(key.startswith("on") for _, attributes in tags for key in attributes)
    assert "\x1b" not in summary.text
    assert max(map(len, summary.text.splitlines())) < 700


@pytest.mark.usefixtures("no_pictures")
def test_names_beyond_unicode_text_are_written(study, tmp_path):
    study.write_run(tmp_path, *study.sizes[0], 1, run="lone \ud800 surrogate")
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert "lone" in summary.page.read_text()


def test_one_script_may_run_and_it_is_the_pages(nine):
    page = nine.page.read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in page


OWNED = "document.documentElement.setAttribute('data-owned', '1')"
NAMES = (
    f"<script>{OWNED}</script>",
    f'"><img src=x onerror="{OWNED}">',
    f"'><svg onload={OWNED}>",
    f"javascript:{OWNED}",
    f"</td></title></style></textarea><script>{OWNED}</script>",
    f"{{{{ 7*7 }}}}\n<a href='javascript:{OWNED}'>x</a>",
    "\u202etxt.exe\u2066\u200f",
    "x" * 3000,
    "--><!--",
    "=cmd|' /C calc'!A0",
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), "")


def seen_by_a_browser(page, profile):
    """The page's HTML after its scripts have run."""
    flags = (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "dump-dom",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
    command = [CHROMIUM, *(f"--{flag}" for flag in flags), f"--user-data-dir={profile}"]
    done = subprocess.run(
        [*command, page.resolve().as_uri()], capture_output=True, check=True, timeout=120
    )
    return done.stdout.decode()


def is_owned(tags):
    return any("data-owned" in attributes for _, attributes in tags)


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here: Debian's package of that name")
@pytest.mark.usefixtures("no_pictures")
def test_no_name_runs_in_a_browser(study, tmp_path, read_page):
    """Makes every text of a result hostile in turn; a page without escaping is run beside it."""
    text = iter(NAMES * 9)

    def hostile(value, key=""):
        if isinstance(value, dict):
            return {key: hostile(item, key) for key, item in value.items()}
        return next(text) if isinstance(value, str) and key != "protocol_hash" else value

    environment = {"python": "", "command": "", "device": ""}
    for patch in (1, 2, 4, 8):
        folder = study.write_run(tmp_path, *study.sizes[0], patch, environment=environment)
        result = hostile(json.loads((folder / "result.json").read_text()))
        result["metrics"] = {"fd_digits": 1.0 / patch, next(text): 2.0}
        result["protocol"] = {name: name for name in NAMES}
        result["environment"] |= {name: [name] for name in NAMES}
        result["config"] = {name: name for name in NAMES}
        result["published"] = {
            "values": {"fd_digits": 1.0, NAMES[0]: 2.0},
            "protocol": {name: name for name in NAMES},
            "source": NAMES[1],
        }
        lines = [
            {"step": step, "loss": 1.0, "eval/fd_digits": 1.0 / step, "eval/protocol_hash": name}
            for step, name in enumerate(NAMES, start=1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "result.json").write_text(json.dumps(result))
    published = {"values": {"fd_digits": 3.0, NAMES[4]: 1.0}}
    cells = [(name, {"model": name, "published": published}) for name in NAMES]
    study.write_plan(tmp_path, cells, title=NAMES[4])
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "grid.json").write_text(json.dumps({"cells": [{NAMES[0]: NAMES[1]}]}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_text(json.dumps({NAMES[0]: NAMES[1]}))
    summary = report.make_report([tmp_path], tmp_path / "report")
    page = read_page(seen_by_a_browser(summary.page, tmp_path / "profile"))
    assert not is_owned(page.tags)
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 1
    assert "a" not in names
    assert "button" in names, "the page's own script did not run"
    for tag, attributes in page.tags:
        assert tag != "svg" or "viewbox" in attributes, "an svg that is not the page's"
        assert not [key for key in attributes if key.startswith("on")], tag
        assert attributes.get("src", "data:").startswith("data:"), tag
    assert not re.search(
        "[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00-\x09\x0b-\x1f]", "".join(page.words)
    )
    for name in ("index.html", "table.csv", "table.tex", "table.txt"):
        assert "\u202e" not in (summary.out_dir / name).read_text()

    naive = tmp_path / "naive.html"
    naive.write_text(f"<!doctype html><title>x</title><p>{NAMES[0]}")
    assert is_owned(read_page(seen_by_a_browser(naive, tmp_path / "profile")).tags)


TOUCH = """<script>{
const told = {}, all = [...table.querySelectorAll("button")];
const rows = () => [...table.tBodies[0].rows].filter((row) => !row.hidden);
const seen = () => rows().map((row) => row.dataset.r);
const button = all.find((each) => each.textContent == "FD-digits");
button.click();
told.up = seen();
button.click();
told.down = seen();
const search = document.querySelector("input[type=search]");
search.value = "p1 seed0";
search.dispatchEvent(new Event("input"));
told.searched = seen();
const spot = document.querySelector(".panels [data-r='7'] use").getBoundingClientRect();
document.querySelector(".panels svg").dispatchEvent(new PointerEvent("pointermove",
  {clientX: spot.x + spot.width / 2, clientY: spot.y + spot.height / 2}));
told.near = [tip.textContent, document.querySelector("#runs .on").dataset.r];
const press = (key) => document.querySelector("figure svg").dispatchEvent(
  new KeyboardEvent("keydown", {key, bubbles: true}));
press("ArrowRight");
told.tip = tip.textContent;
press("Enter");
told.pinned = [...document.querySelectorAll(".pin")].map((node) => node.dataset.r);
press("Escape");
told.left = [document.querySelectorAll(".pin").length, tip.hidden];
document.body.replaceChildren(document.createElement("pre"));
document.querySelector("pre").textContent = JSON.stringify(told);
}</script>"""  # in a block: the page's own script has names, and its `table` and `tip`


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here: Debian's package of that name")
@pytest.mark.usefixtures("no_pictures")
def test_sorting_searching_and_keys_in_a_browser(study, tmp_path):
    study.write_curves(study.write(tmp_path, seeds=(0, 1)))
    summary = report.make_report([tmp_path], tmp_path / "report")
    touched = tmp_path / "touched.html"
    text, policies = re.subn(
        '<meta http-equiv="Content-Security-Policy".*?>',
        "",
        summary.page.read_text(),
        flags=re.DOTALL,
    )
    assert policies == 1  # else the script of this test could not run
    touched.write_text(text + TOUCH)
    (pre,) = re.findall("<pre>(.*)</pre>", seen_by_a_browser(touched, tmp_path / "profile"))
    told = json.loads(html.unescape(pre))
    runs = summary.groups[0].runs
    by_metric = sorted(range(18), key=lambda i: runs[i].result["metrics"]["fd_digits"])
    assert told["up"] == [str(i) for i in by_metric]
    assert told["down"] == told["up"][::-1]
    assert {runs[int(i)].result["model"]["patch"] for i in told["searched"]} == {1}
    assert {runs[int(i)].result["train"]["seed"] for i in told["searched"]} == {0}
    assert len(told["searched"]) == 3
    assert told["near"][0].startswith(runs[int(told["near"][1])].result["run"])
    assert told["near"][1] == "7"
    assert told["tip"].startswith(runs[0].result["run"])
    assert set(told["pinned"]) == {"0"}
    assert len(told["pinned"]) > 2
    assert told["left"] == [0, True]


@pytest.mark.usefixtures("no_pictures")
def test_every_mark_of_a_run_is_linked_to_its_row(study, tmp_path, read_page):
    study.write_curves(study.write(tmp_path, seeds=(0, 1)))
    page = read_page(report.make_report([tmp_path], tmp_path / "report").page.read_text())
    numbers = [attributes["data-r"] for tag, attributes in page.tags if tag == "tr" and attributes]
    assert numbers == [str(i) for i in range(18)]
    marks = [attributes for tag, attributes in page.tags if tag == "g"]
    linked = {attributes["data-r"] for attributes in marks if "data-r" in attributes}
    assert linked == set(numbers)
    titles = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    for words in (
        "FD-digits against Gflops of one",
        "against parameters",
        "against Gflops of trai",
        "training loss against training steps",
        "of each model at",
    ):
        assert any(words in title for title in titles if title), words
    cells = [attributes for _, attributes in page.tags if attributes.get("class") == "cell"]
    assert len(cells) == 9
    assert {attributes["data-r"] for attributes in cells} <= set(numbers)


@pytest.mark.usefixtures("no_pictures")
def test_published_figures_are_labelled_beside_ours(study, tmp_path, read_page):
    published = {"values": {"fd_digits": 12.5}, "protocol": {}, "source": "a paper"}
    study.write_run(tmp_path / "runs", *study.sizes[0], 1, published=published)
    for patch in (2, 4):
        study.write_run(tmp_path / "runs", *study.sizes[0], patch)
    cells = [("DiT-2x48x2-p1-seed0", {}), ("DiT-9x96x3-p1-seed0", {"published": published})]
    cells += [("half", {}), ("stopped", {})]
    study.write_plan(tmp_path, cells)
    for name, file in (("half", "result.json"), ("stopped", "metrics.jsonl")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / file).write_text("{")
    for folders in ([tmp_path], [tmp_path / "runs"]):
        summary = report.make_report(folders, tmp_path / "report")
        page = read_page(summary.page.read_text())
        words = " ".join(page.words)
        assert "FD-digits, published" in words
        assert "The study has 4 cells, 3 of them without a result" in words
        assert "Published figures are those of others, never ours: a paper" in words
        header = summary.text.splitlines()[0]
        rows = {line.split()[0]: line for line in summary.text.splitlines() if line}
        end = header.index("FD-digits, published") + len("FD-digits, published")
        for name, state in (
            ("DiT-9x96x3-p1-seed0", "not run"),
            ("half", "unreadable"),
            ("stopped", "not finished"),
        ):
            assert state in rows[name]
            assert "NaN" not in rows[name]
        assert rows["DiT-9x96x3-p1-seed0"][:end].endswith("12.5")
        assert rows["DiT-2x48x2-p1-seed0"][:end].endswith("12.5")
        hollow = [a for tag, a in page.tags if tag == "g" and a.get("class") == "published"]
        assert sum("data-r" in attributes for attributes in hollow) == 3  # wide, narrow, parameters
        assert summary.analyses[0].fits[0].n == 3, "a published figure is in no fit"


def test_a_page_without_a_plan_names_nothing_as_not_run(nine):
    assert "not run" not in nine.text
    assert "of them without a result" not in nine.page.read_text()
