"""Pictures and patches of a run: sizes in training, dropped patches, and the checks that model and pictures fit."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_dissect.data.image_sizes import ImageSizes
from hf_dissect.data.sized_batches import size_batches
from hf_dissect.models.patch_tokens import PatchTokens, check_patch_dropout, read_patch_grid
from hf_dissect.selection import OnlineSelector


class Resolution(TrainerCallback):
    """Callback that has a model train on pictures of other sizes, or on a part of their patches, while a run lasts.

    Args:
        args: Arguments of the run.
        model: Model of the run.
        collator: Collator of the run.
        selector: Selector of the run.

    Attributes:
        sizes: Schedule of the sizes of the training pictures; None for the model's own.
        collator: Collator of the run.

    Raises:
        ValueError: Model, collator or pictures do not fit the settings.
    """

    def __init__(self, args: Any, model: nn.Module, collator: Any, selector: OnlineSelector) -> None:
        self.sizes = None if args.image_size is None else ImageSizes(args.image_size)
        self._args = args
        self.collator = collator
        self._state: TrainerState | None = None  # before training
        self._selector = selector
        self._tokens = PatchTokens(args.patch_dropout)
        self._check(model)

    def _check(self, model: nn.Module) -> None:
        args = self._args
        if args.patch_dropout:
            check_patch_dropout(model, args.patch_dropout, "patch_dropout")
        if args.scoring_patch_dropout:
            check_patch_dropout(model, args.scoring_patch_dropout, "scoring_patch_dropout", training=False)
        if args.scoring_image_size is not None:
            check_side(model, args.scoring_image_size, "scoring_image_size", is_smaller=True)
        if self.sizes is None:
            return
        own = [check_side(model, side, "image_size", is_smaller=False) for side in self.sizes.sides]
        if self.sizes.constant is None and self.sizes.sides[-1] != own[-1]:
            raise ValueError(
                f"image_size={args.image_size!r}: the last stage must have the model's own size, {own[-1]} pixels, at "
                "which it is evaluated and used; add it, or give one size for the whole run."
            )
        if self._selector.reference is not None:
            raise ValueError(
                f"image_size={args.image_size!r} does not go with a reference model, whose scores are those of whole "
                "pictures; leave one of the two out."
            )
        if not hasattr(self.collator, "at_size"):
            raise ValueError(
                f"image_size={args.image_size!r}: {type(self.collator).__name__} does not prepare pictures of "
                "several sizes; derive your collator from hf_dissect.SelectionCollator, or leave image_size out."
            )
        for side in self.sizes.sides:
            with self.collator.at_size(side):
                pass

    def size_batches(self, loader: Any) -> Any:
        """Return a loader whose pictures have the size of the step for which they are loaded.

        Args:
            loader: Loader of the training batches.

        Raises:
            ValueError: The loader cannot know for which step it makes a batch.
        """
        changes = self.sizes is not None and self.sizes.constant is None
        if changes and not hasattr(loader, "pick") and getattr(loader, "batch_sampler", None) is None:
            raise ValueError(
                f"image_size={self._args.image_size!r}: a {type(loader.dataset).__name__} yields pairs without a "
                "place in the run; stream them from a datasets.IterableDataset, or give one size for the whole run."
            )
        accumulation = self._args.gradient_accumulation_steps
        return size_batches(loader, self.sizes, self.collator, self._progress, accumulation)

    def _progress(self) -> tuple[int, int]:
        return (0, 1) if self._state is None else (self._state.global_step, self._state.max_steps)

    def describe(self) -> dict[str, float]:
        """Return the size of the pictures of the last step, as a figure for the logs; empty without a schedule."""
        step, max_steps = self._progress()
        return {} if self.sizes is None else {"image_size": self.sizes.find(max(step - 1, 0), max_steps)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Act on the model, and follow the steps."""
        self._state = state
        if self.sizes is not None or self._args.patch_dropout or self._args.scoring_image_size is not None:
            self._tokens.attach(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        self._tokens.detach()
        self._selector.cheap_scoring.tokens.detach()


def check_side(model: nn.Module, side: int, setting: str, *, is_smaller: bool) -> int:
    """Check that a model can read pictures of a side, and return that of its own pictures.

    Args:
        model: Dual encoder, wrapped or not.
        side: Side in pixels.
        setting: Name of the setting, for errors.
        is_smaller: True if the model's own size is not allowed, either.

    Raises:
        ValueError: It cannot.
    """
    grid = read_patch_grid(model, f"{setting}={side}")
    own, patch = grid.side[0], grid.patch[0]
    if len({*grid.side}) > 1 or len({*grid.patch}) > 1:
        raise ValueError(f"{setting}={side}: the model reads pictures of {own} x {grid.side[1]} pixels, not squares.")
    if side % patch or side > own or (is_smaller and side == own):
        sides = list(range(patch, own + (0 if is_smaller else 1), patch))
        shown = ", ".join(map(str, sides if len(sides) < 9 else [*sides[:3], "...", *sides[-3:]]))
        raise ValueError(
            f"{setting}={side} does not fit the model, which reads pictures of {own} pixels in patches of {patch}; "
            f"allowed: {shown or 'none'}."
        )
    return own
