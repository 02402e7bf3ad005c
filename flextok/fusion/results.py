"""Files of answers: typed tables, one row per question, or per question and variant.

| column           | type               | |
| ---------------- | ------------------ | --- |
| `uuid`           | string             | of the item |
| `paraphrases`    | list of string     | the wordings that were used |
| `answers`        | list of string     | the right ones |
| `prediction`     | string             | the answer within the generated text |
| `generation`     | string             | the generated text |
| `predict_lemma`  | list of string     | nullable: filled by `fusion-lemmatize` |
| `answer_lemmas`  | lists of strings   | likewise |
| `paraphrase`     | string             | optional: the one wording of this row |
| `prompt`         | string             | optional |
| `confidence`     | double             | optional |
| `variant`        | int                | optional: which wording; (`uuid`, `variant`) is unique |

How the rows were made stands as JSON under `run_config` in the metadata of the schema.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".feather", ".parquet")
_CONFIG = b"run_config"
REQUIRED = {"uuid": "str", "paraphrases": "list", "answers": "list", "prediction": "str", "generation": "str"}
NULLABLE = {"predict_lemma": "list", "answer_lemmas": "lists"}
OPTIONAL = {"paraphrase": "str", "prompt": "str", "confidence": "double", "variant": "int"}
_KINDS = {"str": "a text", "list": "a list of texts", "lists": "a list of lists of texts", "double": "a number"} | {
    "int": "a whole number"
}


def result_name(method: str, *, num_paraphrases: int | None = None, indices: Sequence[int] | None = None) -> str:
    """The name of a file of results without its suffix: `fusion-5`, or `fusion-0-2-4` for chosen wordings."""
    return f"{method}-{num_paraphrases if indices is None else '-'.join(map(str, indices))}"


def write_results(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    run_config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a file of results, whole or not at all. Optional columns are there if any row has them.

    Raises:
        ValueError: The suffix is neither `.feather` nor `.parquet`; a row lacks a required field, has an unknown one
            or a value of another type; two rows have the same `uuid` and `variant`.
        FileExistsError: There is such a file, and `overwrite` is False.
        ImportError: pyarrow is not installed.
    """
    from flextok.utils.checkpoint import atomic_path

    path = check_target(path, overwrite=overwrite)
    table = _table_of(rows, run_config)
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, temporary)
        else:
            import pyarrow.feather

            pyarrow.feather.write_feather(table, str(temporary))


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of results. Nullable columns that are absent are None; optional ones are left out.

    Raises:
        ValueError: The suffix is another one, the file cannot be read, or a required column is missing.
        ImportError: pyarrow is not installed.
    """
    table = _read_table(path)
    missing = [name for name in REQUIRED if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path}: the column {' and '.join(missing)} is missing; found: {', '.join(table.column_names)}"
        )
    return [dict.fromkeys(NULLABLE) | row for row in table.to_pylist()]


def read_run_config(path: str | Path) -> dict[str, Any] | None:
    """How the rows of a file were made, or None if it does not say; errors as of `read_results`."""
    text = (_read_table(path).schema.metadata or {}).get(_CONFIG)
    return None if text is None else json.loads(text)


def check_target(path: str | Path, *, overwrite: bool) -> Path:
    """The path of a file that may be written.

    Raises:
        ValueError: The suffix is neither `.feather` nor `.parquet`.
        FileExistsError: There is such a file, and `overwrite` is False.
    """
    path = _check_suffix(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; overwrite=true writes it anew")
    return path


def check_row(row: Mapping[str, Any]) -> tuple[str, int | None]:
    """What tells a row from all others: its `uuid` and `variant`.

    Raises:
        ValueError: A required field is missing, a field is unknown, or a value is of another type.
    """
    name = f"row of uuid={row.get('uuid')!r}"
    missing = [field for field in REQUIRED if row.get(field) is None]
    if missing:
        raise ValueError(f"{name}: {' and '.join(missing)} is missing")
    kinds = REQUIRED | NULLABLE | OPTIONAL
    for field, value in row.items():
        if field not in kinds:
            raise ValueError(f"{name}: the field {field!r} is unknown; valid: {', '.join(kinds)}")
        if value is not None and not _is(value, kinds[field]):
            raise ValueError(f"{name}: {field}={value!r} is not {_KINDS[kinds[field]]}")
    return row["uuid"], row.get("variant")


def config_text(run_config: Mapping[str, Any] | None) -> str:
    """A run config as JSON, equal for equal configs; ValueError if it holds anything that JSON cannot."""
    try:
        return json.dumps(run_config, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"run_config cannot be written as JSON: {error}") from error


def _check_suffix(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the suffix {path.suffix!r} is unknown; valid: {', '.join(SUFFIXES)}")
    return path


def _is(value: Any, kind: str) -> bool:
    if kind == "list":
        return isinstance(value, list | tuple) and all(_is(one, "str") for one in value)
    if kind == "lists":
        return isinstance(value, list | tuple) and all(_is(one, "list") for one in value)
    if kind == "str":
        # Halves of a character, which JSON can carry, have no place in a table.
        return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, int if kind == "int" else int | float) and not isinstance(value, bool)


def _table_of(rows: Sequence[Mapping[str, Any]], run_config: Mapping[str, Any] | None) -> "pyarrow.Table":
    pa = _import_pyarrow()
    seen: set[tuple[str, int | None]] = set()
    for row in rows:
        key = check_row(row)
        if key in seen:
            raise ValueError(f"two rows have uuid={key[0]!r} and variant={key[1]}; valid: one row for each")
        seen.add(key)
    used = {name: kind for name, kind in OPTIONAL.items() if any(name in row for row in rows)}
    text = pa.string()
    types = {"str": text, "list": pa.list_(text), "lists": pa.list_(pa.list_(text))} | {
        "double": pa.float64(),
        "int": pa.int64(),
    }
    fields = [
        pa.field(name, types[kind], nullable=name not in REQUIRED)
        for name, kind in (REQUIRED | NULLABLE | used).items()
    ]
    metadata = None if run_config is None else {_CONFIG: config_text(run_config).encode()}
    return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(fields, metadata=metadata))


def _read_table(path: str | Path) -> "pyarrow.Table":
    path = _check_suffix(path)
    pa = _import_pyarrow()
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.ParquetFile(path).read()
        import pyarrow.feather

        return pyarrow.feather.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _import_pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("files of results need pyarrow: pip install 'flextok[fusion]'") from error
    return pyarrow
