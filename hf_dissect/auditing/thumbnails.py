"""Small pictures as files next to the page, so that a browser reads only those that it shows."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from hf_dissect.data.pairs import PairDataset
from hf_dissect.report.data import ROWS_A_FOLDER, thumbnail_jpeg


def write_thumbnails(folder: Path, pairs: PairDataset, indices: Sequence[int], num_workers: int = 0) -> list[int]:
    """Write `<row // 1000>/<row>.jpg`, at most 160 px, one a row; pairs that share a row share the picture.

    Args:
        folder: Folder of the files; created where missing.
        pairs: Data set.
        indices: Indices of the pairs to write.
        num_workers: Number of threads that decode; one at least.

    Returns:
        Rows without a picture.
    """
    row_of_pair = pairs.row_of_pair
    of_row = {int(row_of_pair[index]): int(index) for index in indices}
    for number in {row // ROWS_A_FOLDER for row in of_row}:
        (folder / str(number)).mkdir(parents=True, exist_ok=True)

    def write(row: int) -> int | None:
        jpeg = thumbnail_jpeg(pairs.picture(of_row[row]))
        if jpeg is None:
            return row
        (folder / str(row // ROWS_A_FOLDER) / f"{row}.jpg").write_bytes(jpeg)
        return None

    rows = sorted(of_row)
    with ThreadPoolExecutor(max(1, num_workers)) as threads:
        written = tqdm(threads.map(write, rows), desc="thumbnails", total=len(rows), unit="picture")
        return [row for row in written if row is not None]
