"""One progress bar a run that shows what matters while it trains, instead of a line of figures every few steps."""

import sys

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

_POSTFIX = {
    "loss": "loss",
    "selection_kept_share": "kept",
    "selection_noise_kept": "mismatched kept",
    "selection_scoring_time_share": "scoring time",
}
_SHARES = {"selection_kept_share", "selection_noise_kept", "selection_scoring_time_share"}


class RunProgress(ProgressCallback):
    """The Trainer's bar with loss and selection behind it, and a line for each evaluation."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        if state.is_world_process_zero:
            # In a log file each refresh is a line: there, one in half a minute is enough.
            pause = 0.1 if sys.stderr.isatty() else 30
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, mininterval=pause
            )

    def close(self) -> None:
        """Leave the bars as they are, when training ends early."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or "loss" not in (logs or {}):
            return
        shown = {name: logs[key] for key, name in _POSTFIX.items() if key in logs}
        shares = {_POSTFIX[key] for key in _SHARES}
        self.training_bar.set_postfix_str(
            ", ".join(
                f"{name} {value:.0%}" if name in shares else f"{name} {value:.3g}" for name, value in shown.items()
            ),
            refresh=sys.stderr.isatty(),
        )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.prediction_bar is not None:
            self.prediction_bar.leave = False
        super().on_evaluate(args, state, control, **kwargs)
        if self.training_bar is not None and "eval_recall_sum" in (metrics or {}):
            self.training_bar.write(
                f"epoch {state.epoch:.1f}: recall sum {metrics['eval_recall_sum']:.1f}, "
                f"image to text R@1 {metrics['eval_image_to_text_R@1']:.1f}, "
                f"text to image R@1 {metrics['eval_text_to_image_R@1']:.1f}, loss {metrics['eval_loss']:.3f}"
            )
