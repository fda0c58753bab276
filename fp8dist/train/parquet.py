"""Documents in the rows of .parquet files."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

COLUMN = "text"
KEPT_GROUPS = 2
"""Row groups that are kept after they were read; they are uncompressed whole, for one row too."""


class ParquetRow(NamedTuple):
    """One document: the text of a row."""

    path: Path
    group: int
    row: int
    """Counted from the first of its row group."""
    length: int
    """Bytes: an equal share of what the row group's text takes."""

    @property
    def neighbours(self) -> tuple[Path, int]:
        """The same for documents that are best read one after the other."""
        return self.path, self.group

    def read(self) -> bytes:
        """The document's text, as UTF-8; a row without a value is empty."""
        text = _group(self.path, self.group)[self.row].as_py()
        return b"" if text is None else text.encode("utf-8", errors="replace")


def rows_of(path: Path) -> Iterator[ParquetRow]:
    """Every row of a file, in order; no text is read.

    Raises:
        ValueError: the pyarrow package is missing, the file is no .parquet, or it has no column
            of text.
    """
    with _open(path) as file:
        names = list(file.schema_arrow.names)
        if COLUMN not in names:
            raise ValueError(
                f"{path} has no column {COLUMN!r}; its columns: {', '.join(names)}. Rename the one "
                f"that has the text to {COLUMN!r}"
            )
        kind = file.schema_arrow.field(COLUMN).type
        if str(kind) not in ("string", "large_string"):
            raise ValueError(f"{path}: the column {COLUMN!r} is of type {kind}; expected string")
        for group in range(file.num_row_groups):
            found = file.metadata.row_group(group)
            columns = [found.column(index) for index in range(found.num_columns)]
            [column] = [one for one in columns if one.path_in_schema == COLUMN]
            share = column.total_uncompressed_size // max(1, found.num_rows)
            for row in range(found.num_rows):
                yield ParquetRow(path, group, row, share)


@functools.lru_cache(maxsize=KEPT_GROUPS)
def _group(path: Path, group: int) -> Any:
    """The texts of one row group."""
    with _open(path) as file:
        return file.read_row_group(group, columns=[COLUMN]).column(COLUMN)


def _open(path: Path) -> Any:
    try:
        from pyarrow import ArrowException  # type: ignore # optional
        from pyarrow.parquet import ParquetFile  # type: ignore # optional
    except ImportError as error:
        raise ValueError(f"{path} needs the pyarrow package: pip install pyarrow") from error
    try:
        return ParquetFile(path)
    except ArrowException as error:
        raise ValueError(f"{path} is not a .parquet file that can be read: {error}") from error
