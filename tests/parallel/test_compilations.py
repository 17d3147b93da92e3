"""Where compiled programs are kept, who may say so, and that they stay few."""

import os
import pwd
from pathlib import Path

import jax
import pytest

from ditjax.data import source
from ditjax.errors import UserError
from ditjax.parallel import compilations


@pytest.fixture
def settings(monkeypatch):
    """What `keep` would set, and nothing set in this process."""
    found: dict[str, object] = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_programs_are_kept_by_kind_of_processor(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("DITJAX_CACHE", str(tmp_path))
    compilations.enable_cache()
    folder = Path(settings["jax_compilation_cache_dir"])
    assert folder.parent == tmp_path
    assert folder.is_dir()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "processor : 0\nflags : fpu sse\n")
    compilations.enable_cache()
    other = Path(settings["jax_compilation_cache_dir"])
    assert other.parent == tmp_path
    assert other != folder


def test_it_can_be_switched_off_and_jaxs_own_variable_wins(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("DITJAX_CACHE", "off")
    compilations.enable_cache()
    monkeypatch.setenv("DITJAX_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    compilations.enable_cache()
    assert settings == {}
    assert not list(tmp_path.iterdir())


def no_home(monkeypatch):
    """As in a container that runs under a number without a passwd entry."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize("place", ["{}/file", "", "~/cache", "~nobody_of_this_name/cache"])
def test_a_place_that_cannot_be_written_is_none(place, settings, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DITJAX_CACHE", place.format(tmp_path))
    no_home(monkeypatch)
    compilations.enable_cache()
    assert settings == {}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: compiled programs are not kept: ")
    assert line.endswith("DITJAX_CACHE=DIR names another folder, and DITJAX_CACHE=off none")


def test_without_a_home_data_sets_need_a_folder(monkeypatch, tmp_path):
    no_home(monkeypatch)
    monkeypatch.delenv("DITJAX_DATA", raising=False)
    with pytest.raises(UserError, match=r"home directory.* unless DITJAX_DATA or config\.data"):
        source.data_root()
    assert source.data_root(tmp_path) == tmp_path


def test_the_oldest_go_first(tmp_path):
    for age, name in enumerate(["new", "older", "oldest"]):
        path = tmp_path / "host" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    compilations._prune(tmp_path, 200)
    assert sorted(path.name for path in (tmp_path / "host").iterdir()) == ["new", "older"]
