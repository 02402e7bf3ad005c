"""Imports inside the package point one way, and heavy libraries are imported where they are used."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import REPOSITORY

PACKAGE = REPOSITORY / "flextok"

# What each part may import; a part may always import itself. Parts are the names right below `flextok`.
ATTENTION = {"attention"}
MODEL = {"model", "utils", *ATTENTION}
LIBRARY = {"flextok_wrapper", "vae_wrapper", "flow_matching", "regularizers", *MODEL}
ALLOWED = {
    "attention": set(),
    "chosen_attention": set(),
    "fusion": {"chosen_attention", "embedded", "hub_tables", "seeding", "utils", *ATTENTION},
    "sparse_lm": {"chosen_attention", "evaluation", "seeding", *ATTENTION},
    "model": MODEL,
    "image_codec": MODEL,
    "vae_wrapper": {"image_codec", *MODEL},
    "pixel_vae": {"image_codec", *MODEL},
    "regularizers": MODEL,
    "flow_matching": MODEL,
    "flextok_wrapper": LIBRARY,
    "data": {"hub_tables", "seeding"},
    "hub_tables": set(),
    "seeding": set(),
    "provenance": set(),
    "embedded": set(),
    "reconstruct": {"seeding", *LIBRARY},
    "pictures": {"data", "utils"},
    "evaluation": {
        "config",
        "data",
        "embedded",
        "pictures",
        "provenance",
        "reconstruct",
        "seeding",
        "training",
        *LIBRARY,
    },
    "demo": {"data", "evaluation", "reconstruct", *LIBRARY},
    "generation": {"data", "seeding", *LIBRARY},
}
# Only these parts may import the library at module level, everybody else inside functions.
AT_MODULE_LEVEL = {
    "lightning": {"training", "evaluation", "cli", "data"},
    "diffusers": set(),
    "wandb": set(),
    "sklearn": set(),
    "skimage": set(),
    "torchvision": set(),
    "webdataset": set(),
    "transformers": {"fusion", "sparse_lm"},
    "datasets": set(),
    "litdata": set(),
    "pyarrow": set(),
    "shtab": set(),
    "gradio": {"demo"},
    "spacy": set(),
    "optuna": set(),
}
# These parts may not import the library at all.
NEVER = {
    "attention": {"diffusers", "lightning", "PIL"},
    "fusion": {"diffusers", "lightning"},
    "sparse_lm": {"diffusers", "lightning"},
}


class Import(NamedTuple):
    file: str
    line: int
    part: str
    module: str
    at_module_level: bool
    for_types_only: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def _imports_of(path: Path) -> Iterator[Import]:
    relative = path.relative_to(REPOSITORY)
    package = [*relative.parts[:-1]]
    part = path.stem if len(relative.parts) == 2 else relative.parts[1]

    def visit(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            modules = [f"{source}.{alias.name}" for alias in node.names]
        else:
            modules = []
        for module in modules:
            yield Import(str(relative), node.lineno, part, module, not in_function, for_types)
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_type_block = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function, for_types or is_type_block)

    yield from visit(ast.parse(path.read_text()), False, False)


IMPORTS = [found for path in sorted(PACKAGE.rglob("*.py")) for found in _imports_of(path)]


def part_of(module: str) -> str | None:
    names = module.split(".")
    return names[1] if names[0] == "flextok" and len(names) > 1 else None


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_lies_below_it(part):
    wrong = [
        str(found)
        for found in IMPORTS
        if found.part == part and part_of(found.module) not in {None, part, "__version__", *ALLOWED[part]}
    ]
    assert wrong == []


def test_utils_import_no_other_part_when_they_are_imported():
    """Checkpoints build the model, so they may import it, in the function that does."""
    wrong = [
        str(found)
        for found in IMPORTS
        if found.part == "utils" and part_of(found.module) not in {None, "utils"} and found.at_module_level
    ]
    assert wrong == []


def test_nothing_imports_the_command_line_but_itself():
    allowed = {"cli", "__main__"}
    assert [str(i) for i in IMPORTS if part_of(i.module) == "cli" and i.part not in allowed] == []


def test_training_is_imported_by_the_command_line_and_lazily_by_evaluation():
    """Evaluation reads the checkpoints that training writes, and must not load the trainer otherwise."""
    allowed = {"training", "cli", "__main__"}
    wrong = [
        str(found)
        for found in IMPORTS
        if part_of(found.module) == "training"
        and found.part not in allowed
        and not (found.part == "evaluation" and not found.at_module_level)
    ]
    assert wrong == []


@pytest.mark.parametrize("library", AT_MODULE_LEVEL)
def test_heavy_libraries_are_imported_where_they_are_used(library):
    allowed = AT_MODULE_LEVEL[library]
    wrong = [
        str(found)
        for found in IMPORTS
        if found.module.split(".")[0] == library
        and found.at_module_level
        and not found.for_types_only
        and found.part not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("part", NEVER)
def test_parts_without_images_do_not_know_image_libraries(part):
    wrong = [str(i) for i in IMPORTS if i.part == part and i.module.split(".")[0] in NEVER[part]]
    assert wrong == []


def test_the_package_itself_imports_nothing_heavy():
    wrong = [
        str(found)
        for found in IMPORTS
        if found.file == "flextok/__init__.py"
        and not found.for_types_only
        and found.module.split(".")[0] not in {"importlib", "typing"}
    ]
    assert wrong == []
