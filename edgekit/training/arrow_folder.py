"""A data set of Hugging Face as its ``save_to_disk`` leaves it: Arrow files, mapped into memory.

Knows such folders, their parts and columns; never what is learned from them. Nothing in them is
run, and no path that they name is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import DataError, MissingExtraError, SourceError
from edgekit.formats import json_file

_PARTS, _STATE = "dataset_dict.json", "state.json"
_FEATURES = b"huggingface"  # the key of Arrow's metadata that says what the columns mean
_HELD_OUT = ("test", "validation", "valid")


def is_one(folder: Path) -> bool:
    return (folder / _PARTS).is_file() or (folder / _STATE).is_file()


@dataclass(frozen=True)
class Rows:
    """``table`` is one of pyarrow; ``features`` has for each column what it means."""

    folder: Path
    table: Any
    features: Mapping[str, Any]

    def column_of(self, kind: str) -> str:
        """The name of the first column of a kind ("Image", "ClassLabel"). Raises DataError."""
        for name, feature in self.features.items():
            if isinstance(feature, dict) and feature.get("_type") == kind:
                return name
        raise DataError(
            f"{self.folder} has no column of the kind {kind}",
            hint=f"its columns: {', '.join(self.table.column_names)}"[:200],
        )

    def texts(self, name: str) -> list[str]:
        """The values of a column of texts. Raises DataError."""
        if name not in self.table.column_names:
            raise DataError(
                f"{self.folder} has no column {name!r}",
                hint=f"its columns: {', '.join(self.table.column_names)}"[:200],
            )
        found: list[Any] = self.table.column(name).to_pylist()
        for number, value in enumerate(found):
            if not isinstance(value, str):
                raise DataError(f"{self.folder}: {name!r} of row {number} is no text")
        return found

    def classes(self) -> tuple[list[int], tuple[str, ...]]:
        """The class of each row, and the names of all. Raises DataError."""
        column = self.column_of("ClassLabel")
        names = tuple(map(str, self.features[column].get("names") or ()))
        found: list[Any] = self.table.column(column).to_pylist()
        for number, value in enumerate(found):
            if not isinstance(value, int) or not 0 <= value < len(names):
                raise DataError(
                    f"{self.folder}: row {number} has the label {value},"
                    f" and there are {len(names)} classes"
                )
        return found, names

    def pictures(self) -> list[bytes]:
        """The encoded image of each row. Raises DataError."""
        column = self.table.column(self.column_of("Image"))
        found = []
        for number, value in enumerate(column.to_pylist()):
            body = value.get("bytes") if isinstance(value, dict) else None
            if not isinstance(body, bytes):
                raise DataError(
                    f"{self.folder}: row {number} has no image in it",
                    hint="save_to_disk of the data set that has the images puts them in",
                )
            found.append(body)
        return found


def halves(folder: Path) -> tuple[Rows, Rows | None]:
    """What to learn from, and what to test on where there is a part for that. Raises DataError."""
    parts = _read_json(folder / _PARTS).get("splits", []) if (folder / _PARTS).is_file() else None
    if parts is None:
        return rows(folder), None
    if "train" not in parts:
        raise DataError(f"{folder} has no part 'train'", hint=f"it has {parts}"[:200])
    test = next((name for name in _HELD_OUT if name in parts), None)
    return rows(folder / "train"), rows(folder / test) if test else None


def rows(folder: Path) -> Rows:
    """One part, all of its files. Raises DataError for what is damaged or missing."""
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError("datasets", missing="pyarrow") from None
    names = [
        each.get("filename") if isinstance(each, dict) else None
        for each in _read_json(folder / _STATE).get("_data_files", [])
    ]
    if not names:
        raise DataError(f"{folder} names no files of data")
    tables = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{folder} names {name!r:.80}, which is no file in it")
        try:
            with pyarrow.memory_map(str(folder / name)) as file:
                tables.append(pyarrow.ipc.open_stream(file).read_all())
                tables[-1].validate(full=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{folder / name} is no Arrow file that can be read: {str(error)[:120]}",
                hint="save the data set again",
            ) from None
    try:
        table = pyarrow.concat_tables(tables)
    except pyarrow.ArrowException as error:
        raise DataError(f"the files of {folder} have other columns: {str(error)[:120]}") from None
    return Rows(folder, table, _features(table))


def _features(table: Any) -> dict[str, Any]:
    try:
        body = json_file.parse((table.schema.metadata or {}).get(_FEATURES, b"{}"))
        return dict(body["info"]["features"])
    except (ValueError, KeyError, TypeError):
        return {}  # plain columns: enough for texts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = json_file.read(path)
    except SourceError as error:
        raise DataError(f"{path}: {error.message}", hint="save the data set again") from None
    if not isinstance(body, dict):
        raise DataError(f"{path} is no JSON object")
    return body
