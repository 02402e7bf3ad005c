"""Small models that come with the package.

`digits` and `photos` are tokenizers, each in a folder that `FlexTokFromHub.from_pretrained` takes. `digits` reads 8 x 8
pixels and `photos` 32 x 32, in 16 and 32 tokens. `questions` is a language model for transformers, beside the questions
it was trained on and those it is tested on. The cards in the folders say how they were trained and what was measured.
They are for trying things out: their images are few and small, their facts a few hundred.
"""

from pathlib import Path

PREFIX = "embedded:"
LANGUAGE_MODELS = ("questions",)


def embedded_models() -> dict[str, Path]:
    """The folder of each tokenizer, by name."""
    folders = {file.parent.name: file.parent for file in sorted(Path(__file__).parent.glob("*/config.json"))}
    return {name: folder for name, folder in folders.items() if name not in LANGUAGE_MODELS}


def embedded_model(name: str) -> Path:
    """The folder of one of them; ValueError for another name."""
    models = embedded_models()
    if name not in models:
        raise ValueError(f"no model {name!r} comes with the package; valid are {', '.join(models)}")
    return models[name]


def embedded_language_model(name: str = "questions") -> Path:
    """The folder of a language model, for `AutoModelForCausalLM` and `AutoTokenizer`; ValueError for another name."""
    if name not in LANGUAGE_MODELS:
        raise ValueError(f"no language model {name!r} comes with the package; valid are {', '.join(LANGUAGE_MODELS)}")
    return Path(__file__).parent / name


def embedded_file(path: str) -> Path:
    """The file that a path names; `embedded:questions/train.jsonl` is one that comes with the package."""
    name = path.removeprefix(PREFIX)
    return Path(path) if name == path else Path(__file__).parent / name
