"""Callback that writes the model card of a run: at each save, before each push, and with the results."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dissect.training.run_folder import drop_speed

logger = logging.getLogger(__name__)

CARD = "README.md"


class ModelCardCallback(TrainerCallback):
    """Callback that writes the card of a run to its folder; a subclass writes the files in `write_files`.

    Args:
        run_metrics: Function from the final figures to the content of `metrics.json` on this process.
        describe: Function that returns the further content of the card, see `write_files`.
    """

    def __init__(
        self,
        run_metrics: Callable[[dict[str, Any]], Mapping[str, Any]],
        describe: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._run_metrics = run_metrics
        self._describe = describe
        self._results: tuple[Mapping[str, Any], str] | None = None  # metrics and split of a finished run
        self._given: dict[str, Any] = {}

    def write_files(self, folder: Path, state: TrainerState, content: dict[str, Any]) -> None:
        """Write the card, and the pictures that it shows.

        Args:
            folder: Run folder.
            state: State of the Trainer, with the logs.
            content: Content of the card: `metrics`, the content of `metrics.json` so far; `evaluated`, the split of
                the figures, "validation" or "test"; `progress` of an unfinished run, such as "step 40 of 200", None
                for a finished one; `given`, the `license`, `language`, `tags` and `datasets` from the user; and what
                `describe` returned.
        """
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Discard the results of an earlier training."""
        self._results = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the card of the run so far."""
        self._try_to_write(args, state)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the card of the run so far."""
        self._try_to_write(args, state)

    def finish(self, args: TrainingArguments, state: TrainerState, metrics: Mapping[str, Any], evaluated: str) -> None:
        """Write the card of the finished run, and keep its results for later writes.

        Args:
            args: Arguments of the run.
            state: State of the Trainer.
            metrics: Content of `metrics.json`.
            evaluated: Split of the figures, "validation" or "test".
        """
        self._results = metrics, evaluated
        self.write(args, state)

    def write(self, args: TrainingArguments, state: TrainerState, **given: Any) -> None:
        """Write the card in its present state, on the process that saves only.

        Args:
            args: Arguments of the run.
            state: State of the Trainer.
            given: `license`, `language`, `tags` and `datasets` for the metadata of this card and later ones.
        """
        self._given |= {name: value for name, value in given.items() if value is not None}
        if not args.should_save:
            return
        metrics, evaluated = self._results or (self._run_metrics(find_last_evaluation(state)), "validation")
        progress = None if self._results else f"step {state.global_step:,} of {state.max_steps:,}"
        content = {"metrics": metrics, "evaluated": evaluated, "progress": progress, "given": self._given}
        self.write_files(Path(str(args.output_dir)), state, {**content, **self._describe()})

    def _try_to_write(self, args: TrainingArguments, state: TrainerState) -> None:
        try:
            self.write(args, state)
        except OSError as error:  # training must not end for the sake of its card
            logger.warning("The model card could not be written (%s); training continues.", error)


def find_last_evaluation(state: TrainerState) -> dict[str, Any]:
    """Return the figures of the last evaluation, named as final figures; empty without any."""
    evaluations = (entry for entry in reversed(state.log_history) if "eval_loss" in entry)
    last = {key: value for key, value in next(evaluations, {}).items() if key.startswith("eval_")}
    return drop_speed(last, "eval")
