"""Model card of a student: what it reads and tells, how it learnt, and its results as the Hub reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedTokenizerBase

from hf_dissect.cards.citations import bibtex
from hf_dissect.cards.metadata import data_fields, eval_result, listed
from hf_dissect.cards.privacy import hub_dataset, hub_id, may_be_published
from hf_dissect.cards.rows import hyperparameter_rows, result_rows, told
from hf_dissect.cards.templates import render_card, template_folder
from hf_dissect.distillation.summary import metrics_of_this_process
from hf_dissect.model_card import card_description, card_title
from hf_dissect.report.data import replace_file
from hf_dissect.training.card_callback import CARD, ModelCardCallback

if TYPE_CHECKING:
    from hf_dissect.distillation.recipe import DistillationRecipe
    from hf_dissect.distillation.trainer import AuxiliaryDistillationTrainer

TAGS = ("hf_dissect", "knowledge-distillation", "cross-modal-distillation")

_TEMPLATE = "student.md.jinja"
_TITLE = "Student distilled with hf_dissect"
_PAPERS = {
    "amid": "chen2023amid",
    "mi_student_only": "chen2023amid",
    "hinton": "hinton2015distilling",
    "crd": "tian2020crd",
}
_TASKS = {"image": "image-classification", "text": "text-classification"}
_RESULTS = ("student_accuracy", "retrieval_R@1")
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
        path: the file to write.
        trainer: knows the student, its processor and the recipe.
        metrics: the content of the run's `metrics.json`, as far as it is known.
        evaluated, progress, told_by_user: as of `hf_dissect.model_card.write_model_card`.
    """
    recipe, student = trainer.recipe, trainer.student
    title = card_title(recipe, metrics, _TITLE)
    started_from = student.encoder.name_or_path if recipe is None else recipe.student.name_or_path
    labels = [student.config.id2label[number] for number in range(student.config.num_labels)]
    reads, papers = _reads(trainer), _PAPERS.get(metrics["method"])
    card = render_card(
        _TEMPLATE,
        metadata=_metadata(metrics, title, recipe, evaluated, reads, hub_id(started_from), told_by_user).to_yaml(),
        title=title,
        description=card_description(recipe),
        progress=progress,
        column=metrics["student"],
        auxiliaries=metrics["auxiliaries"],
        method=metrics["method"],
        base_model=hub_id(started_from),
        from_scratch=not started_from,
        num_labels=len(labels),
        labels=[label for label in labels if may_be_published(label)][:_SHOWN_LABELS],
        training=_training_rows(metrics, recipe),
        settings=hyperparameter_rows(metrics),
        evaluated=evaluated,
        results=result_rows(metrics),
        model_id=trainer.hub_model_id or ".",
        reads=reads,
        main_input=student.main_input_name,
        shape=(1, *trainer.data_collator.shapes.get(metrics["student"], ())),
        encoder=type(student.encoder).__name__,
        versions=told(list(metrics["versions"].items())),
        citations=bibtex([papers], template_folder() / "citations.bib") if papers else "",
    )
    return replace_file(path, card)


def _reads(trainer: "AuxiliaryDistillationTrainer") -> str:
    """The kind of the student's modality: "image", "text" or "array"."""
    processor = trainer.processors.get(trainer.args.student_column)
    if processor is None:
        return "array"
    return "text" if isinstance(processor, PreTrainedTokenizerBase) else "image"


def _metadata(
    metrics: Mapping[str, Any],
    name: str,
    recipe: "DistillationRecipe | None",
    evaluated: str,
    reads: str,
    base_model: str | None,
    told_by_user: Mapping[str, Any],
) -> ModelCardData:
    dataset = None if recipe is None else hub_dataset(recipe.data.source, recipe.data.path)
    results = _eval_results(metrics, recipe, evaluated, _TASKS.get(reads, "other"))
    return ModelCardData(
        license=told_by_user.get("license"),
        language=told_by_user.get("language"),
        library_name="transformers",
        pipeline_tag=_TASKS.get(reads),
        tags=[*TAGS, metrics["method"], *listed(told_by_user.get("tags"))],
        base_model=base_model,
        datasets=list(dict.fromkeys([*listed(dataset), *listed(told_by_user.get("datasets"))])) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _eval_results(
    metrics: Mapping[str, Any], recipe: "DistillationRecipe | None", evaluated: str, task: str
) -> list[EvalResult]:
    data = data_fields(None, None, evaluated)
    if recipe is not None:
        section = recipe.data
        split = evaluated if section.group_column else getattr(section, f"{evaluated}_split")
        data = data_fields(section.source, section.path, split, section.name)
    if recipe is None or hub_dataset(recipe.data.source, recipe.data.path) is None:
        data |= {"dataset_type": "labelled-rows", "dataset_name": "Labelled rows"}
    final = metrics["final"]
    return [eval_result(task, data, key, final[key]) for key in _RESULTS if final.get(key) is not None]


def _training_rows(metrics: Mapping[str, Any], recipe: "DistillationRecipe | None") -> list[tuple[str, str]]:
    rows, weights = metrics["rows"], metrics["term_weights"]
    return told(
        [
            ("Recipe", None if recipe is None else recipe.name),
            ("Data", None if recipe is None else hub_dataset(recipe.data.source, recipe.data.path)),
            *((f"Weight of {name.replace('_', ' ')}", weight) for name, weight in weights.items() if weight),
            ("Complete training rows", rows["complete"]),
            ("Rows without a label", rows["unlabelled"] or None),
            ("Rows without an auxiliary modality", rows["student_only"] or None),
            ("Rows that could not be used", rows["unusable"] or None),
            ("Optimiser steps", metrics["steps"]),
            ("Wall-clock", f"{metrics['times']['total_s']:.0f} s"),
        ]
    )
