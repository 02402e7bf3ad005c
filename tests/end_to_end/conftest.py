"""Runs of a few steps and what they export, made once and only read by the tests."""

from functools import cache

import pytest

from tests.end_to_end.support import export, train


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """Called with a dropout form: the folder of a run on the digits, and that of its export."""

    @cache
    def release(form):
        folder = tmp_path_factory.mktemp(form)
        train(folder / "run", "experiment=digits", f"dropout={form}")
        return folder / "run", export(folder / "run", folder / "export")

    return release
