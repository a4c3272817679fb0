"""Progress bar that shows loss and selection, instead of a line of figures every few steps."""

import sys
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from hf_dissect.evaluation.passes import make_bar

_POSTFIX = {
    "loss": "loss",
    "selection_kept_share": "kept",
    "selection_noise_kept": "mismatched kept",
    "selection_estimated_mismatched": "estimated mismatched",
    "selection_scoring_time_share": "scoring time",
}
_SHARES = {key for key in _POSTFIX if key != "loss"}


class RunProgress(ProgressCallback):
    """Progress bar of the Trainer, with loss and selection behind it and a line for each evaluation.

    Args:
        name: Words in front of the bar; None for none.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self._name = name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar, from the step that the run is resumed at."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            # In a log file each refresh is a new line, so it is refreshed twice a minute only.
            interval = 0.1 if sys.stderr.isatty() else 30
            self.training_bar = tqdm(
                desc=self._name,
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                mininterval=interval,
            )

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Show a bar for an evaluation that takes more than a few seconds."""
        if self.prediction_bar is None and state.is_world_process_zero and has_length(eval_dataloader):
            self.prediction_bar = make_bar("evaluation", len(eval_dataloader))
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def close(self) -> None:
        """Leave the bars in their state when training ends early."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the logged figures of training behind the bar."""
        if self.training_bar is None or logs is None or "loss" not in logs:
            return
        shown = {name: logs[key] for key, name in _POSTFIX.items() if key in logs}
        shares = {_POSTFIX[key] for key in _SHARES}
        self.training_bar.set_postfix_str(
            ", ".join(
                f"{name} {value:.0%}" if name in shares else f"{name} {value:.3g}" for name, value in shown.items()
            ),
            refresh=sys.stderr.isatty(),
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line with the figures of an evaluation above the bar."""
        if self.prediction_bar is not None:
            self.prediction_bar.leave = False
        super().on_evaluate(args, state, control, **kwargs)
        if self.training_bar is not None and metrics is not None and "eval_recall_sum" in metrics:
            self.training_bar.write(
                f"epoch {state.epoch:.1f}: recall sum {metrics['eval_recall_sum']:.1f}, "
                f"image to text R@1 {metrics['eval_image_to_text_R@1']:.1f}, "
                f"text to image R@1 {metrics['eval_text_to_image_R@1']:.1f}, loss {metrics['eval_loss']:.3f}"
            )
