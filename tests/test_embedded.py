"""The models that come with the package."""

import pytest

from flextok import FlexTokFromHub
from flextok.embedded import embedded_model, embedded_models
from flextok.evaluation.source import find_source


@pytest.mark.parametrize(("name", "tokens"), [("digits", 16), ("photos", 32)])
def test_models_come_with_the_package(name, tokens, tmp_path):
    source = find_source(f"embedded:{name}", runs=tmp_path)
    model, weights = source.load(weights="ema")
    assert (source.kind, weights, model.num_registers) == ("export", "as exported", tokens)
    assert FlexTokFromHub.from_pretrained(str(embedded_model(name))).num_registers == tokens
    # What is measured does not go into the package.
    assert not source.default_output_dir.is_absolute()


def test_another_name_is_refused(tmp_path):
    assert list(embedded_models()) == ["digits", "photos"]
    with pytest.raises(ValueError, match="no model 'cats' comes with the package; valid are digits, photos"):
        find_source("embedded:cats", runs=tmp_path)
