"""Keeps the model card of a run current: it is written anew at each save, before each push, and with the results."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dissect.model_card import ModelFacts, write_model_card
from hf_dissect.models.adapters import base_of_adapter
from hf_dissect.models.feature_encoder import PrecomputedFeaturesConfig
from hf_dissect.models.loading import bare_model, contrastive_kind, networks_of, text_padding
from hf_dissect.report.picture import PICTURE, draw_run
from hf_dissect.training.run_folder import metrics_of_this_process, without_speed

if TYPE_CHECKING:
    from hf_dissect.trainer import DissectTrainer

logger = logging.getLogger(__name__)

CARD = "README.md"


class ModelCardCallback(TrainerCallback):
    """Writes the card of a run into its folder; what stands there, a subclass tells."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._results: tuple[dict[str, Any], str] | None = None  # metrics of a finished run, and of which split
        self._told: dict[str, Any] = {}

    def metrics_so_far(self, last: Mapping[str, Any]) -> Mapping[str, Any]:
        """As `metrics.json` will tell them, with the figures of the last evaluation for the final ones."""
        raise NotImplementedError

    def write_card(self, **about: Any) -> None:
        """Write the files.

        Args:
            about: `metrics`, `evaluated`, `progress` and `told_by_user` as of `write_model_card`.
        """
        raise NotImplementedError

    def on_train_begin(self, args, state, control, **kwargs):
        self._results = None

    def on_save(self, args, state, control, **kwargs):
        self._try_to_write()

    def on_push_begin(self, args, state, control, **kwargs):
        self._try_to_write()

    def finish(self, metrics: dict[str, Any], evaluated: str) -> None:
        """Write the card of the finished run: from now on, it tells these metrics of the split `evaluated`."""
        self._results = metrics, evaluated
        self.write()

    def write(self, **told: Any) -> None:
        """Write the card as things stand; on the process that saves, and on no other.

        Args:
            told: `license`, `language`, `tags` and `datasets` for the metadata, here and in later cards.
        """
        self._told |= {name: value for name, value in told.items() if value is not None}
        if not self._trainer.args.should_save:
            return
        state = self._trainer.state
        metrics, evaluated = self._results or (self.metrics_so_far(_last_evaluation(state)), "validation")
        progress = None if self._results else f"step {state.global_step:,} of {state.max_steps:,}"
        self.write_card(metrics=metrics, evaluated=evaluated, progress=progress, told_by_user=self._told)

    def _try_to_write(self) -> None:
        try:
            self.write()
        except OSError as error:  # training is worth more than its card
            logger.warning("The model card could not be written (%s); training goes on.", error)


class SelectionCard(ModelCardCallback):
    """The card of a `DissectTrainer`, and the picture that it shows."""

    _trainer: "DissectTrainer"

    def metrics_so_far(self, last: Mapping[str, Any]) -> Mapping[str, Any]:
        return metrics_of_this_process(self._trainer, self._trainer.strategy.name, last)

    def write_card(self, **about: Any) -> None:
        trainer = self._trainer
        state, folder = trainer.state, Path(trainer.args.output_dir)
        shown = draw_run(folder / PICTURE, state.log_history, trainer.monitor.score_histogram())
        card = {
            **about,
            "base_model": _base_model(trainer, about["metrics"]),
            "recipe": trainer.recipe,
            "model": model_facts(trainer.model),
            "model_id": trainer.hub_model_id,
        }
        picture = {} if shown is None else {"picture": PICTURE, "picture_text": shown}
        write_model_card(folder / CARD, **card, **picture)
        # PEFT puts a card of its own beside each adapter, which names the folder of the base model.
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / CARD
        if about["progress"] is not None and checkpoint.is_file():
            write_model_card(checkpoint, **card)


class CardedTrainer(Trainer):
    """A Trainer with a model card that is current; its subclasses say which, by `card_callback`."""

    card_callback: type[ModelCardCallback] = SelectionCard

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.model_card = self.card_callback(self)
        self.add_callback(self.model_card)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the run's card to `output_dir`; `push_to_hub` does so, and passes on what it was given.

        Args:
            language, license, tags: for the metadata; a license only stands there if it is told.
            dataset_tags: ids of the Hub of the data that were trained on.
            model_name, finetuned_from, tasks, dataset, dataset_args: taken by `transformers.Trainer`; this card knows
                them from the run.
        """
        self.model_card.write(language=language, license=license, tags=tags, datasets=dataset_tags)


def model_facts(model: nn.Module) -> ModelFacts:
    """What a card must tell of a model, wrapped or not, so that it can be run."""
    config = bare_model(model).config
    vision, networks = getattr(config, "vision_config", None), networks_of(model)
    return ModelFacts(
        model_type=networks[0].config.model_type,
        loss=contrastive_kind(model),
        padding=text_padding(model),
        feature_size=vision.hidden_size if isinstance(vision, PrecomputedFeaturesConfig) else None,
        twins=len(networks) > 1,
    )


def _base_model(trainer: "DissectTrainer", metrics: Mapping) -> str | None:
    """What training started from; of an adapter, what that is put on. None for a model that was built here."""
    if "adapter" in metrics:
        return base_of_adapter(trainer.model)
    if trainer.recipe is not None:
        return trainer.recipe.model.name_or_path
    return bare_model(trainer.model).name_or_path or None


def _last_evaluation(state: TrainerState) -> Mapping[str, Any]:
    evaluations = (entry for entry in reversed(state.log_history) if "eval_loss" in entry)
    last = {key: value for key, value in next(evaluations, {}).items() if key.startswith("eval_")}
    return without_speed(last, "eval")
