import pytest

from ditjax.data.source import prepare


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data_dir with digits prepared: read it, do not write to it."""
    folder = tmp_path_factory.mktemp("data")
    prepare("digits", folder)
    return folder
