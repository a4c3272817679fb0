"""Accuracy and R@1 of a saved student, on the data of its own recipe or on any others that have its modality."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader

from hf_dissect.data.loading import load_splits
from hf_dissect.distillation.data_collator import DistillationCollator, array_shape, row_masks
from hf_dissect.distillation.evaluation import prediction_metrics
from hf_dissect.distillation.recipe import DistillationDataSection, ModalitySection
from hf_dissect.distillation.saved_student import student_folder
from hf_dissect.distillation.student import StudentForClassification
from hf_dissect.distillation.training_data import Columns, ModalityRows, column_names
from hf_dissect.hub.address import HubAddress, is_hub_address
from hf_dissect.hub.published_files import METRICS_FILE, RECIPE_FILE
from hf_dissect.hub.pull import download_model
from hf_dissect.hub.shared_recipe import select_shareable
from hf_dissect.recipe.fields import Faults, RecipeError, read_section
from hf_dissect.recipe.file import read_settings
from hf_dissect.report.tables import as_mapping
from hf_dissect.runs.distil import (
    first_rows,
    load_columns,
    load_processor,
    read_arrays,
    rows_of_groups,
)
from hf_dissect.runs.evaluate import data_section

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What the run of a student tells of the rows that it read; `data` is None without a recipe."""

    column: str
    label_column: str
    max_caption_length: int | None
    data: DistillationDataSection | None


def evaluate_student(
    checkpoint: str,
    *,
    data: str | None = None,
    split: str = "test",
    column: str | None = None,
    label_column: str | None = None,
    max_rows: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, float]:
    """Evaluate a student.

    Args:
        checkpoint: run folder, `checkpoint-N` folder, Hub id or `hub:USER/REPO`.
        data: file of arrays (.npz) or a folder with one, or what `evaluate_checkpoint` takes; None for the data of
            the recipe that lies beside the student. Data without splits are split by the groups of that recipe, if
            they have them.
        split: of the data.
        column: of what the student reads; None for the name that it had in training.
        label_column: of the classes; None for the name that it had in training.
        max_rows: evaluate the first rows only.
        batch_size: rows a forward pass.
        num_workers: processes that decode.

    Returns:
        `student_accuracy` and `retrieval_R@1`, shares in [0, 1], see `prediction_metrics`; `num_rows`, those that they
        rest on.

    Raises:
        HubError: the Hub has no such model, or cannot be reached.
        ValueError: there are no data, no such split or column, labels that the student does not know, or no row that
            it can read.
    """
    folder, is_own = _find(checkpoint)
    origin = _origin(folder, checkpoint, is_own)
    rows = _own_rows(origin, checkpoint, split, max_rows) if data is None else _given_rows(data, split, origin)
    rows = first_rows(rows, max_rows)
    column, label_column = column or origin.column, label_column or origin.label_column
    model = StudentForClassification.from_pretrained(student_folder(folder)).eval()
    labels = [model.config.id2label[number] for number in range(model.config.num_labels)]
    found = ModalityRows(rows, [column], label_column, labels=labels)
    processor = _processor(student_folder(folder))
    collator = DistillationCollator(
        [column],
        {column: model.main_input_name},
        {} if processor is None else {column: processor},
        {column: array_shape(rows[column], column)} if processor is None else {},
        origin.max_caption_length,
    )
    batches = DataLoader(found, batch_size, collate_fn=collator, num_workers=num_workers)
    predictions, label, row_state = _predictions(model, batches, column)
    figures = prediction_metrics(predictions, label, row_state)
    if not figures:
        raise ValueError(f"{column}: of {len(found)} rows the student can read none that has a label.")
    return figures | {"num_rows": int(row_masks(row_state)[0].sum())}


@torch.no_grad()
def _predictions(
    model: StudentForClassification, batches: DataLoader, column: str
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    device = PartialState().device
    model.to(device)
    parts: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        output = model(**{name: value.to(device) for name, value in batch["inputs"][column].items()})
        part = {"student_logits": output.logits.float(), "student_embeds": output.embeds}
        for name, value in (part | {"label": batch["label"], "row_state": batch["row_state"]}).items():
            parts.setdefault(name, []).append(value.cpu())
    found = {name: torch.cat(values).numpy() for name, values in parts.items()}
    return found, found.pop("label"), found.pop("row_state")


def _find(checkpoint: str) -> tuple[Path, bool]:
    """The folder with the student's files, and whether it is this machine's own: who wrote another, nobody knows."""
    if Path(checkpoint).exists():
        return Path(checkpoint), True
    address = HubAddress.parse(checkpoint) if is_hub_address(checkpoint) else HubAddress(checkpoint)
    return download_model(address, more=(RECIPE_FILE, METRICS_FILE)), False


def _origin(folder: Path, checkpoint: str, is_own: bool) -> _Origin:
    places = (folder, folder.parent) if is_own else (folder,)
    recipe = next((place / RECIPE_FILE for place in places if (place / RECIPE_FILE).is_file()), None)
    if recipe is None:
        text = (folder / METRICS_FILE).read_text("utf-8") if (folder / METRICS_FILE).is_file() else "{}"
        metrics = as_mapping(json.loads(text))
        settings = as_mapping(metrics.get("settings"))
        names = (metrics.get("student", "image"), settings.get("label_column", "label"))
        return _Origin(*names, settings.get("max_caption_length"), None)
    settings, faults = read_settings(recipe), Faults()
    if not is_own:
        settings = select_shareable(settings)[0]
    # The rest of it is for the training, and may lack what is of another machine.
    student = read_section(ModalitySection, settings.get("student"), "student", faults)
    data = read_section(DistillationDataSection, settings.get("data"), "data", faults)
    if faults.messages:
        raise RecipeError(str(recipe) if is_own else checkpoint, faults.messages)
    length = as_mapping(settings.get("distillation")).get("max_caption_length")
    return _Origin(student.column or "image", data.label_column, length, data)


def _own_rows(origin: _Origin, checkpoint: str, split: str, max_rows: int | None) -> Columns:
    if origin.data is None:
        raise ValueError(f"{checkpoint} has no {RECIPE_FILE} to take the data from; name the data with --data.")
    if not origin.data.path:
        raise ValueError(f"{checkpoint} does not tell where its data are; name them with --data.")
    limits = {} if max_rows is None else {"max_train_rows": max_rows, "max_eval_rows": max_rows}
    return _one_of(load_columns(dataclasses.replace(origin.data, **limits)), split)


def _given_rows(data: str, split: str, origin: _Origin) -> Columns:
    place = Path(data)
    if data.endswith(".npz") or (place.is_dir() and any(place.glob("*.npz"))):
        splits: dict[str, Columns] = {"train": read_arrays(data)}
    else:
        splits = load_splits(**dataclasses.asdict(data_section("", data, None)))
    if list(splits) != ["train"]:
        return _one_of(splits, split)
    rows = splits["train"]
    if origin.data is not None and origin.data.group_column in column_names(rows):
        of_split = rows_of_groups(rows, origin.data.group_column, getattr(origin.data, f"{split}_groups", []))
        if _length(of_split):
            return of_split
    if split != "train":
        logger.warning("The data have no split %r; all of them are evaluated.", split)
    return rows


def _one_of(splits: dict[str, Columns], split: str) -> Columns:
    if split not in splits:
        raise ValueError(f"split {split!r}: the data have {', '.join(splits)}; name one of these with --split.")
    return splits[split]


def _length(rows: Columns) -> int:
    return len(rows[column_names(rows)[0]])


def _processor(folder: Path) -> Any:
    """The image processor or tokenizer that was saved with a student; None for a student of arrays."""
    for kind, name in (("image", "preprocessor_config.json"), ("text", "tokenizer_config.json")):
        if (folder / name).is_file():
            return load_processor(kind, str(folder))
    return None
