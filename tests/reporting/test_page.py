"""The page by itself: no network, and a hostile string stays text."""

import re

from ditjax import report


def test_page_needs_no_network(nine, read_page):
    page = nine.page.read_text()
    for tag, attributes in read_page(page).tags:
        assert tag not in ("link", "iframe", "object", "embed")
        for key in ("src", "href", "srcset", "data", "action"):
            if attributes.get(key) is not None:
                assert attributes[key].startswith("data:image/png;base64,"), (tag, key)
    assert not re.search(r"@import|url\(|https?://", page)
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


def test_names_beyond_unicode_text_are_written(study, tmp_path):
    study.write_run(tmp_path, *study.sizes[0], 1, run="lone \ud800 surrogate")
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert "lone" in summary.page.read_text()
