"""Read the rows of a table with a transform of the user's, which is given all columns, decoded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets

from hf_dissect.data.images import UnusableImage, decode_image
from hf_dissect.data.pair_columns import PairColumns


def has_transform(rows: Any) -> bool:
    """Return whether a table has a transform, by `with_transform` or `set_transform`."""
    return isinstance(rows, datasets.Dataset) and rows.format["type"] == "custom"


def recognise_transformed(rows: datasets.Dataset, **names: str | None) -> PairColumns:
    """Recognise the columns of a table with a transform, by its first row; arguments as `PairColumns.recognise`.

    Image and caption are outputs of the transform; ids, tasks and truth are columns of the table.

    Raises:
        ValueError: The transform returns no image or caption, or a column is missing.
    """
    outputs = list(TransformedRows(rows, PairColumns("", "")).read_all([0]))
    available = list(dict.fromkeys([*outputs, *rows.column_names]))
    columns = PairColumns.recognise(available, **names)
    for argument, name in (("image_column", columns.image), ("caption_column", columns.caption)):
        if name not in outputs:
            raise ValueError(
                f"{argument}={name!r}: the transform of the data (with_transform) returns {', '.join(outputs)} without "
                "this column; return it, or name another."
            )
    given = {"id_column": columns.sample_id, "task_column": columns.task, "clean_column": names.get("clean")}
    for argument, name in given.items():
        if name is not None and name not in rows.column_names:
            raise ValueError(
                f"{argument}={name!r}: ids, tasks and truth must be columns of the table, which has "
                f"{', '.join(rows.column_names)}; make the column with map() instead of with_transform()."
            )
    return columns if columns.clean in rows.column_names else replace(columns, clean=None)


class TransformedRows:
    """Rows of a table as its transform returns them.

    Args:
        rows: Table with a transform.
        columns: Columns of a pair.
    """

    def __init__(self, rows: datasets.Dataset, columns: PairColumns) -> None:
        self.rows = rows
        self.columns = columns

    def check_several(self, table_has_several: bool) -> bool:
        """Return whether the transform returns a list of captions a row.

        Args:
            table_has_several: True if the table has lists of captions, by whose lengths the pairs are numbered.

        Raises:
            ValueError: The transform makes a list of one caption.
        """
        captions = self.read([0])[self.columns.caption]
        several = isinstance(captions[0], list | tuple)
        if several and not table_has_several:
            raise ValueError(
                f"The transform of the data (with_transform) returns lists as {self.columns.caption!r}, where the "
                "table has one caption a row: pairs are numbered before. Make the lists with map()."
            )
        return several

    def read(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        """Return images and captions of rows, by the names of their columns.

        A row whose picture cannot be decoded has an `UnusableImage` as its image.

        Raises:
            ValueError: The transform changes the number of rows, or leaves out a column.
        """
        outputs = self.read_all(indices)
        for name in (self.columns.image, self.columns.caption):
            count = None if name not in outputs else len(outputs[name])
            if count != len(indices):
                found = "no such column" if count is None else f"{count} values"
                raise ValueError(
                    f"The transform of the data (with_transform) returns {found} of {name!r} for {len(indices)} rows; "
                    "it must return one a row. Drop or multiply rows with filter() or map() before."
                )
        return {name: list(outputs[name]) for name in (self.columns.image, self.columns.caption)}

    def read_all(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return all that the transform returns for rows."""
        try:
            return self.rows[list(indices)]
        except Exception:
            # `datasets` decodes before it calls the transform, and one damaged picture would stop all.
            problems = [self._find_problem(index) for index in indices]
            if not any(problems):
                raise
        good = [index for index, problem in zip(indices, problems, strict=True) if problem is None]
        outputs = self.rows[good] if good else {}
        values = {name: iter(column) for name, column in outputs.items()}
        names = list(outputs) or [name for name in self.columns.names if name] or self.rows.column_names
        filled: dict[str, list[Any]] = {name: [] for name in names}
        plain = self.rows.with_format(None)
        for index, problem in zip(indices, problems, strict=True):
            for name in names:
                if problem is None:
                    filled[name].append(next(values[name]))
                elif name == self.columns.image:
                    filled[name].append(problem)
                else:
                    known = name in self.rows.column_names and not _has_pictures(self.rows.features[name])
                    filled[name].append(plain.select_columns([name])[index][name] if known else None)
        return filled

    def _find_problem(self, index: int) -> UnusableImage | None:
        """Return the reason why a picture of a row cannot be decoded, None if all can."""
        for name, feature in self.rows.features.items():
            if not isinstance(feature, datasets.Image):
                continue
            column = self.rows.with_format(None).select_columns([name])
            value = column.cast_column(name, datasets.Image(decode=False))[index][name]
            try:
                if value is not None:
                    decode_image(value)
                    datasets.Image().decode_example(value)
            except UnusableImage as error:
                return error
            except Exception as error:  # what decode_image reads and `datasets` does not, such as damaged side data
                return UnusableImage(f"{type(error).__name__}: {error}", value.get("path"))
        return None


def _has_pictures(feature: Any) -> bool:
    return isinstance(feature, datasets.Image)
