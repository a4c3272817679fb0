"""Model card of the student of a distillation."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from hf_dissect.cards.card import choose_title, write_card
from hf_dissect.cards.citations import find_papers
from hf_dissect.cards.metadata import ResultKind, build_metadata, describe_data, list_results
from hf_dissect.cards.privacy import hub_dataset, may_be_published
from hf_dissect.cards.rows import list_distillation, tabulate_training
from hf_dissect.distillation.summary import metrics_of_this_process
from hf_dissect.training.card_callback import CARD, ModelCardCallback

if TYPE_CHECKING:
    from hf_dissect.distillation.recipe import DistillationRecipe
    from hf_dissect.distillation.trainer import AuxiliaryDistillationTrainer

TAGS = ("hf_dissect", "knowledge-distillation", "cross-modal-distillation")

_TEMPLATE = "student.md.jinja"
_TITLE = "Student distilled with hf_dissect"
_TASKS = {"image": "image-classification", "text": "text-classification"}
_RESULTS = r"student_accuracy|retrieval_R@1"
_UNNAMED_DATA = ("labelled-rows", "Labelled rows")
_SHOWN_LABELS = 20


class StudentCard(ModelCardCallback):
    """The card of an `AuxiliaryDistillationTrainer`."""

    _trainer: "AuxiliaryDistillationTrainer"

    def metrics_so_far(self, last: Mapping[str, Any]) -> Mapping[str, Any]:
        return metrics_of_this_process(self._trainer, dict(last))

    def write_card(self, **about: Any) -> None:
        write_student_card(Path(self._trainer.args.output_dir) / CARD, self._trainer, **about)


def write_student_card(
    path: str | Path,
    trainer: "AuxiliaryDistillationTrainer",
    *,
    metrics: Mapping[str, Any],
    evaluated: str,
    progress: str | None,
    told_by_user: Mapping[str, Any],
) -> Path:
    """Write the card of a trainer's student to `path`, and return the path.

    Args:
        path: file to write.
        trainer: trainer of the student, with its processor and recipe.
        metrics: content of the run's `metrics.json`, as far as it is known.
        evaluated: split of the final figures, "test" or "validation".
        progress: how far an unfinished run has come, such as "step 40 of 200".
        told_by_user: `license`, `language`, `tags` and `datasets` for the metadata.
    """
    recipe, student = trainer.recipe, trainer.student
    title = choose_title(recipe, metrics, _TITLE)
    started_from = student.encoder.name_or_path if recipe is None else recipe.student.name_or_path
    dataset = None if recipe is None else hub_dataset(recipe.data.source, recipe.data.path)
    labels = [student.config.id2label[number] for number in range(student.config.num_labels)]
    reads = _reads(trainer)
    kinds = [ResultKind(_RESULTS, _TASKS.get(reads, "other"), _describe_data(recipe, evaluated))]
    metadata = build_metadata(
        title,
        dataset=dataset,
        started_from=started_from,
        library_name="transformers",
        pipeline_tag=_TASKS.get(reads),
        tags=[*TAGS, metrics["method"]],
        results=list_results(metrics, kinds),
        given=told_by_user,
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
        model_id=trainer.hub_model_id,
        papers=find_papers(metrics),
        column=metrics["student"],
        auxiliaries=metrics["auxiliaries"],
        method=metrics["method"],
        num_labels=len(labels),
        labels=[label for label in labels if may_be_published(label)][:_SHOWN_LABELS],
        reads=reads,
        main_input=student.main_input_name,
        shape=(1, *trainer.data_collator.shapes.get(metrics["student"], ())),
        encoder=type(student.encoder).__name__,
    )


def _reads(trainer: "AuxiliaryDistillationTrainer") -> str:
    """Return the kind of the student's modality: "image", "text" or "array"."""
    processor = trainer.processors.get(trainer.args.student_column)
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
