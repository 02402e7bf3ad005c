"""Two small models side by side: 8 tokens with mask tokens, 4 tokens that are hidden when dropped."""

import pytest

from tests.demo.support import load_workbench
from tests.support import export_small_model


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo_models")
    return [
        export_small_model(folder / "mask_token", "dropout=mask_token"),
        export_small_model(folder / "packed", "dropout=packed", "size.registers=4"),
    ]


@pytest.fixture
def workbench(model_folders):
    return load_workbench(*model_folders)
