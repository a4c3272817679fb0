"""The Trainer's arguments plus what online selection adds to them."""

import json
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from hf_dissect.objective import GscObjective
from hf_dissect.selection import SCOPES, STRATEGIES, SelectionStrategy, make_strategy


@dataclass
class DissectTrainingArguments(TrainingArguments):
    """Arguments of `DissectTrainer`: all of `transformers.TrainingArguments`, and the following.

    `per_device_train_batch_size` is the number of candidates `B` a step and rank; `k = round(selection_ratio * B)` of
    them train. Steps, epochs and schedules count candidate batches, as in the Trainer.

    > Selection

    Args:
        selection_strategy: "dissect", "random", "small_loss", "big_loss", "clipscore" or "none" (all candidates).
        selection_ratio: share of the candidates that train, in (0, 1].
        selection_scope: with several processes, "local": each keeps `k` of its own candidates; "global": the `k` of
            each are chosen among the candidates of all and shared out, so that the processes together keep what one
            process would keep of the union.
        selection_warmup_epochs: epochs before `dissect`'s warm-up variant begins to select by differential, and `ncr`
            by its mixture.
        selection_options: further keywords of the strategy, e.g. `{"variant": "momentum", "momentum": 0.9}`.
        initial_ledger: scores of the same pairs to begin with: a run folder, a checkpoint, Parquet files, or
            `hub:USER/REPO`, a data set that `hf-dissect push-ledger` published. With them, `selection_warmup_epochs`
            of `dissect` may be 0. A resumed run goes on with its own ledger.
        scoring_batch_size: candidates per scoring forward; None for all `B` at once.
        record_selection: write `selection.parquet`, one row per candidate and step. Every candidate is then scored,
            also for strategies that would not need it.

    > Objective

    Args:
        mask_false_negatives: pairs that share an image or a caption are not each other's negatives.
        grad_cache_chunk_size: pairs that go through the model at a time with gradient; the loss is that of the whole
            batch all the same (GradCache, arXiv 2101.06983), at the price of a second forward pass. None: all at once.
        gsc: train with GSC's soft labels (arXiv 2405.16996) after a warm-up; its keywords, see `GscObjective`, such as
            `{"gamma": 0.01, "warmup_epochs": 2}`, or `{}` for the defaults. None: the contrastive loss throughout.

    > Data

    Args:
        image_column, caption_column, id_column, task_column, clean_column: names of the columns; None for the usual
            ones (`image`; `caption`, `text` or the list `captions`; numbered rows; no tasks; `clean`).
        max_caption_length: tokens a caption is cut to; None for the model's limit.
        shuffle_buffer: pairs of a stream that each data worker holds undecoded, to give them out in a random order; 0
            for the order of the stream. Map-style data are shuffled as a whole.
        max_bad_fraction: training stops when more than this share of the pairs cannot be read.

    > Run folder

    Args:
        save_run_folder: after training, write model, processor, ledger, `metrics.json` and `report.html` to the root
            of `output_dir`.

    Raises:
        ValueError: a value is impossible; the message names the argument, the value and what is allowed.
    """

    selection_strategy: str = field(
        default="dissect", metadata={"help": f"Which candidates train: {', '.join(STRATEGIES)}."}
    )
    selection_ratio: float = field(default=0.5, metadata={"help": "Share of the candidates that train, in (0, 1]."})
    selection_scope: str = field(
        default="local", metadata={"help": "Candidates of each process (local) or of all together (global)."}
    )
    selection_warmup_epochs: int = field(
        default=1,
        metadata={"help": "Epochs before the warm-up variant of dissect, or ncr, selects by what it recorded."},
    )
    selection_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Further keywords of the strategy as JSON, e.g. {"variant": "momentum"}.'}
    )
    initial_ledger: str | None = field(
        default=None, metadata={"help": "Scores to begin with: a run folder, Parquet files, or hub:USER/REPO."}
    )
    scoring_batch_size: int | None = field(
        default=None, metadata={"help": "Candidates per scoring forward; all at once by default."}
    )
    record_selection: bool = field(
        default=False, metadata={"help": "Write selection.parquet, one row per candidate and step."}
    )
    mask_false_negatives: bool = field(
        default=False, metadata={"help": "Pairs that share an image or a caption are not each other's negatives."}
    )
    grad_cache_chunk_size: int | None = field(
        default=None, metadata={"help": "Pairs a forward pass with gradient, for batches beyond memory (GradCache)."}
    )
    gsc: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Soft labels (GSC): their keywords as JSON, {} for the defaults."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images (default: image)."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the captions (default: caption, text or the list captions)."}
    )
    id_column: str | None = field(default=None, metadata={"help": "Column of unique ids (default: row numbers)."})
    task_column: str | None = field(default=None, metadata={"help": "Column of the task or domain (default: none)."})
    clean_column: str | None = field(
        default=None, metadata={"help": "Column that is true where the caption belongs to the image (default: clean)."}
    )
    max_caption_length: int | None = field(
        default=None, metadata={"help": "Tokens a caption is cut to (default: the model's limit)."}
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Pairs of a stream held by each data worker to be shuffled; 0: none."}
    )
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "Training stops when more than this share of the pairs cannot be read."}
    )
    save_run_folder: bool = field(
        default=True, metadata={"help": "Write model, ledger, metrics.json and report.html when training ends."}
    )

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["selection_options", "gsc"]

    def __post_init__(self):
        self.selection_options = _options(
            "selection_options", self.selection_options, such_as='{"variant": "momentum"}'
        )
        if self.gsc is not None:
            defaults = {setting.name: setting.default for setting in fields(GscObjective) if setting.name != "seed"}
            self.gsc = defaults | _options("gsc", self.gsc, such_as='{"gamma": 0.01}')
        if is_one_of_several_without_accelerator():
            self.use_cpu = True  # else each process would train alone, and write over the others
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # nothing to pin for, and torch warns of it each epoch
        _check_share("selection_ratio", self.selection_ratio, zero_allowed=False)
        _check_share("max_bad_fraction", self.max_bad_fraction, zero_allowed=True)
        _check_count("selection_warmup_epochs", self.selection_warmup_epochs, least=0)
        _check_count("scoring_batch_size", self.scoring_batch_size, least=1, none_allowed=True)
        _check_count("max_caption_length", self.max_caption_length, least=3, none_allowed=True)
        _check_count("grad_cache_chunk_size", self.grad_cache_chunk_size, least=1, none_allowed=True)
        _check_count("shuffle_buffer", self.shuffle_buffer, least=0)
        if self.selection_scope not in SCOPES:
            raise ValueError(f"selection_scope={self.selection_scope!r}: choose one of {', '.join(SCOPES)}.")
        strategy = self.make_strategy()
        self._check_enough_pairs(strategy)
        if self.max_steps <= 0 and getattr(strategy, "warmup_epochs", 0) >= math.ceil(self.num_train_epochs):
            raise ValueError(
                f"selection_warmup_epochs={self.selection_warmup_epochs} leaves nothing to select in "
                f"num_train_epochs={self.num_train_epochs}; train longer, warm up shorter, or use dissect's "
                "momentum variant."
            )
        self._check_gsc()

    def _check_gsc(self) -> None:
        gsc = self.make_gsc()
        if gsc is None:
            return
        if self.mask_false_negatives:
            raise ValueError(
                f"gsc={self.gsc!r} does not go with mask_false_negatives: its loss and its evidence count every other "
                "pair of the batch. Set one of the two otherwise."
            )
        if self.max_steps <= 0 and gsc.warmup_epochs >= math.ceil(self.num_train_epochs):
            raise ValueError(
                f"gsc: warmup_epochs={gsc.warmup_epochs} leaves no epoch with soft labels in "
                f"num_train_epochs={self.num_train_epochs}; train longer, or warm up shorter."
            )

    def _check_enough_pairs(self, strategy: SelectionStrategy) -> None:
        candidates = self.per_device_train_batch_size
        ratio = 1 if strategy.keeps_all else self.selection_ratio
        if ratio * candidates < 2 - 1e-9:
            kept = f"{ratio * candidates:g} pair{'' if ratio * candidates == 1 else 's'}"
            raise ValueError(
                f"selection_ratio={self.selection_ratio} of per_device_train_batch_size={candidates} keeps {kept}; a "
                "contrastive loss needs at least 2. Raise one of the two."
            )

    def num_selected(self, num_candidates: int) -> int:
        """`k = round(selection_ratio * B)` for `B` candidates."""
        return round(self.selection_ratio * num_candidates)

    def make_strategy(self) -> SelectionStrategy:
        """Build the strategy that the arguments describe."""
        options = dict(self.selection_options)
        if self.selection_strategy in ("dissect", "ncr"):
            options.setdefault("warmup_epochs", self.selection_warmup_epochs)
        if self.selection_strategy == "dissect":
            options.setdefault("history_given", self.initial_ledger is not None)
        return make_strategy(self.selection_strategy, **options)

    def make_gsc(self) -> GscObjective | None:
        """Build the objective with soft labels that the arguments describe; None where they ask for none."""
        if self.gsc is None:
            return None
        try:
            return GscObjective(**{"seed": self.seed} | self.gsc)
        except TypeError as error:
            raise ValueError(f"gsc={self.gsc!r}: {error}.") from error

    def column_names(self) -> dict[str, str | None]:
        """Column names as keywords of `hf_dissect.data.as_pairs`."""
        return {
            "image": self.image_column,
            "caption": self.caption_column,
            "sample_id": self.id_column,
            "task": self.task_column,
            "clean": self.clean_column,
        }


def is_one_of_several_without_accelerator() -> bool:
    """Whether processes were started together where torch sees no accelerator: they have to be told to use CPUs."""
    chosen = "ACCELERATE_TORCH_DEVICE" in os.environ
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not chosen and not torch.accelerator.is_available()


def _options(name: str, given: Any, *, such_as: str) -> dict[str, Any]:
    options = {} if given is None or given == "" else given
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except json.JSONDecodeError:
            pass
    if not isinstance(options, dict):
        raise ValueError(f"{name}={given!r}: must be a dict, or JSON of one, such as {such_as}.")
    return dict(options)


def _check_share(name: str, value: Any, *, zero_allowed: bool) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 <= value <= 1 and (value or zero_allowed)):
        raise ValueError(f"{name}={value!r}: must be {'at least' if zero_allowed else 'above'} 0 and at most 1.")


def _check_count(name: str, value: Any, *, least: int, none_allowed: bool = False) -> None:
    if value is None and none_allowed:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        allowed = f"an integer of at least {least}" + (", or None" if none_allowed else "")
        raise ValueError(f"{name}={value!r}: must be {allowed}.")
