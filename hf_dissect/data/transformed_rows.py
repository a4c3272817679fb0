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

    Image and caption are outputs of the transform; ids, tasks, truth and weights are columns of the table.

    Raises:
        ValueError: The transform returns no image or caption, or a column is missing.
    """
    outputs = list(TransformedRows(rows, PairColumns("", "")).read_all([0]))
    available = list(dict.fromkeys([*outputs, *rows.column_names]))
    columns = PairColumns.recognise(available, **names)
    for argument, name in (("image_column", columns.image), ("caption_column", columns.caption)):
        if name not in outputs:
            raise ValueError(
                f"{argument}={name!r}: the transform of the data (with_transform) returns {', '.join(outputs)} "
                "without this column; return it, or name another."
            )
    given = {"id_column": columns.sample_id, "task_column": columns.task, "clean_column": names.get("clean")}
    given |= {"weight_column": columns.weight, "balance_column": columns.balance}
    for argument, wanted in given.items():
        if wanted is not None and wanted not in rows.column_names:
            kinds = {"weight_column": "weights", "balance_column": "clusters"}.get(argument, "ids, tasks and truth")
            raise ValueError(
                f"{argument}={wanted!r}: {kinds} must be columns of the table, which has "
                f"{', '.join(rows.column_names)}; make the column with map() instead of with_transform()."
            )
    present = {name: name if name in rows.column_names else None for name in (columns.clean, columns.text_features)}
    return replace(columns, clean=present[columns.clean], text_features=present[columns.text_features])


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
            batch, problems = self._decode_each(indices)
            if not problems:
                raise
        failed = {place: error for place, error in problems.items() if error is not None}
        good = [place for place in range(len(indices)) if place not in failed]
        readable = {name: [values[place] for place in good] for name, values in batch.items()}
        outputs = dict(self.rows.format["format_kwargs"]["transform"](readable)) if good else batch
        return {name: self._fill(name, outputs[name], batch, good, failed) for name in outputs}

    def _decode_each(self, indices: Sequence[int]) -> tuple[dict[str, list[Any]], dict[int, UnusableImage | None]]:
        """Decode rows one by one.

        Returns:
            The batch that the transform is given, with None for pictures that cannot be decoded; and by place the rows
            that `datasets` cannot decode, with the reason, or None where the picture is read here all the same.
        """
        plain = self.rows.with_format(None).select_columns(self.rows.format["columns"] or self.rows.column_names)
        pictures = [name for name, feature in plain.features.items() if _has_pictures(feature)]
        for name in pictures:
            plain = plain.cast_column(name, datasets.Image(decode=False))
        batch, failed = plain[list(indices)], dict[int, UnusableImage | None]()
        for name in pictures:
            for place, value in enumerate(batch[name]):
                if value is None:
                    continue
                try:
                    batch[name][place] = datasets.Image().decode_example(value)
                except Exception:  # Pillow's plugins raise nearly anything on damaged files
                    failed.setdefault(place, None)
                    try:
                        batch[name][place] = decode_image(value)  # which leaves damaged side data out
                    except UnusableImage as error:
                        batch[name][place], failed[place] = None, error
        return batch, failed

    def _fill(
        self,
        name: str,
        values: Sequence[Any],
        batch: dict[str, list[Any]],
        good: Sequence[int],
        failed: dict[int, UnusableImage],
    ) -> list[Any]:
        """Return a column of all rows, with the columns of the table for those that were left out."""
        filled = list(batch.get(name, [None] * (len(good) + len(failed))))
        if good:
            for place, value in zip(good, values, strict=True):
                filled[place] = value
        for place, error in failed.items():
            if name == self.columns.image:
                filled[place] = error
        return filled


def _has_pictures(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) and feature.decode
