"""What `flextok.fusion` offers is there, and costs nothing until it is used."""

import pytest

import flextok.fusion
from tests.support import python_output


@pytest.mark.parametrize("name", flextok.fusion.__all__)
def test_every_name_can_be_imported(name):
    assert getattr(flextok.fusion, name).__module__.startswith("flextok.fusion.")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fuse'"):
        flextok.fusion.fuse  # noqa: B018


def test_reading_results_does_not_load_transformers():
    code = (
        "import sys; from flextok.fusion import read_results; print(sorted({'torch', 'transformers'} & {*sys.modules}))"
    )
    assert python_output("-c", code).strip() == "[]"
