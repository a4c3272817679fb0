"""Image columns whose rows stay encoded until they are needed."""

from datasets import Dataset, Image, IterableDataset, Value
from datasets.features.features import FeatureType

from hf_dissect.data.files import find_image_column


def stop_decoding(rows: Dataset | IterableDataset, image_column: str | None) -> Dataset | IterableDataset:
    """Return the rows with image columns as bytes and path, so that a pair may be dropped before it is decoded."""
    named = find_image_column(rows, image_column)
    if rows.features is None:  # a stream that does not know its columns
        return rows.cast_column(named, Image(decode=False))
    for column, feature in rows.features.items():
        if isinstance(feature, Image) or (column == named and _stores_images(feature)):
            rows = rows.cast_column(column, Image(decode=False))
    return rows


def _stores_images(feature: FeatureType) -> bool:
    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, dict) and bool(feature) and set(feature) <= {"bytes", "path"}
