"""Small tokenizers that come with the package, each in a folder that `FlexTokFromHub.from_pretrained` takes.

`digits` reads 8 x 8 pixels and `photos` 32 x 32, in 16 and 32 tokens; the cards in the folders say how they were
trained and what was measured. They are for trying things out: their images are few and small.
"""

from pathlib import Path

PREFIX = "embedded:"


def embedded_models() -> dict[str, Path]:
    """The folder of each model, by name."""
    return {file.parent.name: file.parent for file in sorted(Path(__file__).parent.glob("*/config.json"))}


def embedded_model(name: str) -> Path:
    """The folder of one of them; ValueError for another name."""
    models = embedded_models()
    if name not in models:
        raise ValueError(f"no model {name!r} comes with the package; valid are {', '.join(models)}")
    return models[name]
