"""Evaluation of a saved student by accuracy and R@1, on the data of its recipe or on others of its modality."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader

from hf_dissect.data.loading import load_splits
from hf_dissect.distillation.data_collator import DistillationCollator, compute_row_masks, find_array_shape
from hf_dissect.distillation.evaluation import compute_prediction_metrics
from hf_dissect.distillation.recipe import DistillationDataSection, ModalitySection
from hf_dissect.distillation.saved_student import find_student_folder, parse_address
from hf_dissect.distillation.student import StudentForClassification
from hf_dissect.distillation.training_data import Columns, ModalityRows, list_columns
from hf_dissect.hub.published_files import METRICS_FILE, RECIPE_FILE
from hf_dissect.hub.pull import download_model
from hf_dissect.hub.shared_recipe import select_shareable
from hf_dissect.recipe.fields import Faults, RecipeError, read_section
from hf_dissect.recipe.file import read_settings
from hf_dissect.report.tables import as_mapping
from hf_dissect.runs.data_settings import change_data, refuse_for_arrays
from hf_dissect.runs.distil import load_columns, read_arrays, select_groups, take_first_rows
from hf_dissect.runs.distillation_trainer import load_processor
from hf_dissect.runs.saved_model import (
    adapt_section,
    choose_data,
    describe_missing_recipe,
    find_recipe_file,
    pick_split,
)

_OF_PAIRS = {"image_column": "use --image-column", "streaming": "the rows are read as a table"}
_OF_PAIRS |= dict.fromkeys(
    ("caption_column", "task_column", "clean_column", "id_column"), "a student reads one column"
)


@dataclasses.dataclass(frozen=True)
class _Training:
    """Settings of a student's training that its evaluation needs.

    Attributes:
        column: Column of the student's modality.
        label_column: Column of the classes.
        max_caption_length: Number of tokens at which texts are cut; None for the tokenizer's limit.
        data: Data section of the recipe; None without a recipe.
    """

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
    data_settings: Mapping[str, Any] | None = None,
    max_rows: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, float]:
    """Evaluate a student.

    Args:
        checkpoint: Run folder, `checkpoint-N` folder, Hub id or `hub:USER/REPO`.
        data: File of arrays (.npz) or folder with one, or any data that `evaluate_checkpoint` takes; None for the data
            of the recipe next to the student. Data without splits are split by the groups of that recipe, if they have
            its column of groups.
        split: Split of the data.
        column: Column that the student reads; None for that of the training.
        label_column: Column of the classes; None for that of the training.
        data_settings: Further settings of the data by name, see `evaluate_checkpoint`.
        max_rows: Number of rows to evaluate, from the first; None for all.
        batch_size: Number of rows in a forward pass.
        num_workers: Number of processes that decode.

    Returns:
        `student_accuracy` and `retrieval_R@1`, shares in [0, 1], see `compute_prediction_metrics`, and `num_rows`, the
        number of evaluated rows.

    Raises:
        HubError: The Hub has no such model, or cannot be reached.
        ValueError: There are no data, no such split or column, labels that are not classes of the student, or no
            labelled row that it can read.
    """
    is_own = Path(checkpoint).exists()  # a recipe from elsewhere is not trusted
    folder = Path(checkpoint) if is_own else download_model(parse_address(checkpoint), (RECIPE_FILE, METRICS_FILE))
    training = _read_training(folder, checkpoint, is_own)
    if data is None:
        rows = _load_own_rows(training.data, checkpoint, split, max_rows, data_settings)
    else:
        rows = _load_given_rows(data, split, training.data, data_settings)
    rows = take_first_rows(rows, max_rows)
    column, label_column = column or training.column, label_column or training.label_column
    student = find_student_folder(folder)
    if student is None:
        raise ValueError(f"{checkpoint} does not hold the student of a distillation.")
    model = StudentForClassification.from_pretrained(student).eval()
    dataset = ModalityRows(rows, [column], label_column, labels=model.labels)
    processor = _load_processor(student)
    collator = DistillationCollator(
        [column],
        {column: model.main_input_name},
        {} if processor is None else {column: processor},
        {column: find_array_shape(rows[column], column)} if processor is None else {},
        training.max_caption_length,
    )
    batches = DataLoader(dataset, batch_size, collate_fn=collator, num_workers=num_workers)
    predictions, label, row_state = _predict(model, batches, column)
    figures = compute_prediction_metrics(predictions, label, row_state)
    if not figures:
        raise ValueError(f"{column}: none of the {len(dataset)} rows has a label and can be read by the student.")
    return figures | {"num_rows": int(compute_row_masks(row_state)[0].sum())}


@torch.no_grad()
def _predict(
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
    outputs = {name: torch.cat(values).numpy() for name, values in parts.items()}
    return outputs, outputs.pop("label"), outputs.pop("row_state")


def _read_training(folder: Path, checkpoint: str, is_own: bool) -> _Training:
    recipe = find_recipe_file(folder, is_own=is_own)
    if recipe is None:
        text = (folder / METRICS_FILE).read_text("utf-8") if (folder / METRICS_FILE).is_file() else "{}"
        metrics = as_mapping(json.loads(text))
        settings = as_mapping(metrics.get("settings"))
        names = (metrics.get("student", "image"), settings.get("label_column", "label"))
        return _Training(*names, settings.get("max_caption_length"), None)
    settings, faults = read_settings(recipe), Faults()
    if not is_own:
        settings = select_shareable(settings)[0]
    # The other sections matter in training only, and may name files that this machine lacks.
    student = read_section(ModalitySection, settings.get("student"), "student", faults)
    data = read_section(DistillationDataSection, settings.get("data"), "data", faults)
    if faults.messages:
        raise RecipeError(str(recipe) if is_own else checkpoint, faults.messages)
    length = as_mapping(settings.get("distillation")).get("max_caption_length")
    return _Training(student.column or "image", data.label_column, length, data)


def _load_own_rows(
    section: DistillationDataSection | None,
    checkpoint: str,
    split: str,
    max_rows: int | None,
    settings: Mapping[str, Any] | None,
) -> Columns:
    if section is None:
        raise ValueError(describe_missing_recipe(checkpoint))
    section = change_data(section, settings, named=False, refused={"label_column": "use --label-column"})
    if not section.path:
        raise ValueError(f"The recipe of {checkpoint} does not name its data; name them with --data.")
    return pick_split(load_columns(adapt_section(section, max_rows=max_rows)), split, whole=False)


def _load_given_rows(
    data: str, split: str, section: DistillationDataSection | None, settings: Mapping[str, Any] | None
) -> Columns:
    place = Path(data)
    if data.endswith(".npz") or (place.is_dir() and any(place.glob("*.npz"))):
        refuse_for_arrays(settings, data)
        splits: dict[str, Columns] = {"train": read_arrays(data)}
    else:
        given = change_data(choose_data("", data, None), settings, named=True, refused=_OF_PAIRS)
        splits = load_splits(**dataclasses.asdict(given))
    group_column = None if section is None else section.group_column
    if list(splits) == ["train"] and group_column is not None and group_column in list_columns(splits["train"]):
        rows = select_groups(splits["train"], group_column, getattr(section, f"{split}_groups", []))
        if len(rows[list_columns(rows)[0]]):
            return rows
    return pick_split(splits, split, whole=True)


def _load_processor(folder: Path) -> Any:
    """Load the image processor or tokenizer that was saved with a student; None for a student of arrays."""
    for kind, name in (("image", "preprocessor_config.json"), ("text", "tokenizer_config.json")):
        if (folder / name).is_file():
            return load_processor(kind, str(folder))
    return None
