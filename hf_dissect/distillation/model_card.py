"""Model card of the student of a distillation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, TrainerState

from hf_dissect.cards.card import choose_title, write_card
from hf_dissect.cards.citations import find_papers
from hf_dissect.cards.metadata import ResultKind, build_metadata, describe_data, list_results
from hf_dissect.cards.privacy import hub_dataset, may_be_published
from hf_dissect.cards.rows import list_distillation, tabulate_training
from hf_dissect.distillation.student import StudentForClassification
from hf_dissect.training.card_callback import CARD, ModelCardCallback

if TYPE_CHECKING:
    from hf_dissect.distillation.recipe import DistillationRecipe

TAGS = ("hf_dissect", "knowledge-distillation", "cross-modal-distillation")

_TEMPLATE = "student.md.jinja"
_TITLE = "Student distilled with hf_dissect"
_TASKS = {"image": "image-classification", "text": "text-classification"}
_RESULTS = r"student_accuracy|retrieval_R@1"
_UNNAMED_DATA = ("labelled-rows", "Labelled rows")
_SHOWN_LABELS = 20


class StudentCard(ModelCardCallback):
    """Card of a `DistillationTrainer`."""

    def write_files(self, folder: Path, state: TrainerState, content: dict[str, Any]) -> None:
        """Write `README.md`; `content` are arguments of `write_student_card`."""
        write_student_card(folder / CARD, **content)


def write_student_card(
    path: str | Path,
    *,
    student: StudentForClassification,
    metrics: Mapping[str, Any],
    recipe: "DistillationRecipe | None",
    processor: Any,
    shape: Sequence[int],
    model_id: str | None,
    evaluated: str,
    progress: str | None,
    given: Mapping[str, Any],
) -> Path:
    """Write the card of a student to `path`, and return the path.

    Args:
        path: File to write.
        student: The student.
        metrics: Content of the run's `metrics.json`, as far as it is known.
        recipe: Recipe of the run, if it has one.
        processor: Image processor or tokenizer of the student's modality; None for arrays.
        shape: Shape of the array that the student reads; empty for pictures and text.
        model_id: Id under which the student can be loaded; None for the folder of the card.
        evaluated: As in `hf_dissect.model_card.write_model_card`.
        progress: As in `hf_dissect.model_card.write_model_card`.
        given: `license`, `language`, `tags` and `datasets` from the user.
    """
    title = choose_title(recipe, metrics, _TITLE)
    started_from = student.encoder.name_or_path if recipe is None else recipe.student.name_or_path
    dataset = None if recipe is None else hub_dataset(recipe.data.source, recipe.data.path)
    labels = student.labels
    reads = _reads(processor)
    kinds = [ResultKind(_RESULTS, _TASKS.get(reads, "other"), _describe_data(recipe, evaluated))]
    metadata = build_metadata(
        title,
        dataset=dataset,
        started_from=started_from,
        library_name="transformers",
        pipeline_tag=_TASKS.get(reads),
        tags=[*TAGS, metrics["method"]],
        results=list_results(metrics, kinds),
        given=given,
    )
    return write_card(
        path,
        _TEMPLATE,
        title=title,
        metadata=metadata,
        metrics=metrics,
        recipe=recipe,
        started_from=started_from,
        training=tabulate_training(metrics, recipe, list_distillation(metrics, dataset)),
        evaluated=evaluated,
        progress=progress,
        model_id=model_id,
        papers=find_papers(metrics),
        column=metrics["student"],
        auxiliaries=metrics["auxiliaries"],
        method=metrics["method"],
        num_labels=len(labels),
        labels=[label for label in labels if may_be_published(label)][:_SHOWN_LABELS],
        reads=reads,
        main_input=student.main_input_name,
        shape=(1, *shape),
        encoder=type(student.encoder).__name__,
    )


def _reads(processor: Any) -> str:
    """Return the kind of the student's modality: "image", "text" or "array"."""
    if processor is None:
        return "array"
    return "text" if isinstance(processor, PreTrainedTokenizerBase) else "image"


def _describe_data(recipe: "DistillationRecipe | None", evaluated: str) -> dict[str, str | None]:
    """Return the fields of `EvalResult` that name the evaluated rows."""
    if recipe is None:
        return describe_data(None, None, evaluated, unnamed=_UNNAMED_DATA)
    data = recipe.data
    split = evaluated if data.group_column else getattr(data, f"{evaluated}_split")
    return describe_data(data.source, data.path, split, data.name, _UNNAMED_DATA)
