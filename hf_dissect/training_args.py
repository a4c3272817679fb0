"""Training arguments of a run with online selection."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainingArguments

from hf_dissect.data.image_sizes import ImageSizes, find_size_fault
from hf_dissect.objective import Objective
from hf_dissect.objectives.division import DivisionObjective
from hf_dissect.objectives.gsc import GscObjective
from hf_dissect.objectives.image_space import make_image_space
from hf_dissect.objectives.noisy_channel import NoisyChannelObjective
from hf_dissect.objectives.repair import Repair
from hf_dissect.objectives.rince import RinceObjective
from hf_dissect.objectives.robust import RobustObjective
from hf_dissect.objectives.symnce import SymnceObjective
from hf_dissect.recipe.balance_rules import find_balance_faults, list_balance_settings
from hf_dissect.recipe.objective_schema import (
    DivisionSection,
    GscSection,
    NoisyChannelSection,
    ObjectiveSection,
    RepairSection,
    RinceSection,
    SymnceSection,
    find_clash,
    find_repair_fault,
    list_robust_objectives,
)
from hf_dissect.recipe.resolution_rules import UNSCORED, find_resolution_faults
from hf_dissect.recipe.schema import (
    DataSection,
    EvaluationSection,
    ModelSection,
    SelectionSection,
)
from hf_dissect.selection import SelectionStrategy, make_strategy
from hf_dissect.selection.cheap_scoring import CheapScoring
from hf_dissect.selection.ledger_plan import make_plan
from hf_dissect.selection.options import find_usage_problem
from hf_dissect.selection.usage import set_usage_penalty
from hf_dissect.settings import check_values, declared, list_in_docstring, list_settings
from hf_dissect.training.training_args import BaseTrainingArguments


@list_in_docstring
@dataclass
class DissectTrainingArguments(BaseTrainingArguments):
    """Arguments of `DissectTrainer`: all of `transformers.TrainingArguments`, and the following.

    `per_device_train_batch_size` is the number `B` of candidates of a step on each rank. Of these,
    `k = round(selection_ratio * B)` train. Steps, epochs and schedules count candidate batches.

    Raises:
        ValueError: A value is not allowed; the message names the argument, the value and the allowed ones.
    """

    selection_strategy: str = declared(SelectionSection, "strategy")
    selection_ratio: float = declared(SelectionSection, "ratio")
    selection_scope: str = declared(SelectionSection, "scope")
    selection_warmup_epochs: int = declared(SelectionSection, "warmup_epochs")
    selection_options: dict[str, Any] | str | None = declared(SelectionSection, "options")
    selection_reference: str | None = declared(SelectionSection, "reference")
    initial_ledger: str | None = declared(SelectionSection, "ledger")
    scoring_batch_size: int | None = declared(SelectionSection, "scoring_batch_size")
    selection_rescore_every: int = declared(SelectionSection, "rescore_every")
    shard_ledger: bool = declared(SelectionSection, "shard_ledger")
    scoring_dtype: str | None = declared(SelectionSection, "scoring_dtype")
    selection_usage_penalty: float = declared(SelectionSection, "usage_penalty")
    scoring_image_size: int | None = declared(SelectionSection, "scoring_image_size")
    scoring_patch_dropout: float = declared(SelectionSection, "scoring_patch_dropout")
    scoring_exposure: float | None = declared(SelectionSection, "scoring_exposure")
    record_selection: bool = declared(SelectionSection, "record")
    mask_false_negatives: bool = declared(SelectionSection, "mask_false_negatives")
    grad_cache_chunk_size: int | None = declared(ObjectiveSection, "grad_cache_chunk_size")
    gsc: dict[str, Any] | str | None = declared(ObjectiveSection, "gsc")
    rince: dict[str, Any] | str | None = declared(ObjectiveSection, "rince")
    symnce: dict[str, Any] | str | None = declared(ObjectiveSection, "symnce")
    noisy_channel: dict[str, Any] | str | None = declared(ObjectiveSection, "noisy_channel")
    division: dict[str, Any] | str | None = declared(ObjectiveSection, "division")
    repair: dict[str, Any] | str | None = declared(ObjectiveSection, "repair")
    max_train_pairs: int | None = declared(EvaluationSection, "max_train_pairs")
    image_column: str | None = declared(DataSection, "image_column")
    caption_column: str | None = declared(DataSection, "caption_column")
    id_column: str | None = declared(DataSection, "id_column")
    task_column: str | None = declared(DataSection, "task_column")
    clean_column: str | None = declared(DataSection, "clean_column")
    weight_column: str | None = declared(DataSection, "weight_column")
    balance_column: str | None = declared(DataSection, "balance_column")
    balance_strength: float = declared(DataSection, "balance_strength")
    balance_max_visits: int = declared(DataSection, "balance_max_visits")
    sampling_file: str | None = declared(DataSection, "sampling_file")
    max_caption_length: int | None = declared(ModelSection, "max_caption_length")
    image_size: dict[str, Any] | str | int | None = declared(DataSection, "image_size")
    patch_dropout: float = declared(ModelSection, "patch_dropout")
    caption_lengths: list[int] | None = declared(ModelSection, "caption_lengths")
    shuffle_buffer: int = declared(DataSection, "shuffle_buffer")
    fast_decoding: bool = declared(DataSection, "fast_decoding")
    check_reload: bool = declared(ModelSection, "check_reload")

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        *("selection_options", "gsc", "rince", "symnce", "noisy_channel", "division", "repair"),
    ]

    def __post_init__(self) -> None:
        self.selection_options = self._read_selection_options()
        for name in (*_ROBUST, "repair"):
            if getattr(self, name) is not None:
                setattr(self, name, _read_section(name, getattr(self, name)))
        for name in ("initial_ledger", "selection_reference", "sampling_file"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
        self._read_image_size()
        super().__post_init__()
        self._check_resolution()
        strategy = self.make_strategy()
        self._check_enough_pairs(strategy)
        if self.max_steps <= 0 and getattr(strategy, "warmup_epochs", 0) >= math.ceil(self.num_train_epochs):
            raise ValueError(
                f"selection_warmup_epochs={self.selection_warmup_epochs} leaves nothing to select in "
                f"num_train_epochs={self.num_train_epochs}; train longer, warm up shorter, or use dissect's "
                "momentum variant."
            )
        self._check_plan(strategy)
        self._check_balance()
        self._check_robust_objective()

    def _check_plan(self, strategy: SelectionStrategy) -> None:
        plan = make_plan(strategy, self.selection_ratio, self.selection_rescore_every, self.seed)
        if plan is None:
            return
        name = f"selection_rescore_every={self.selection_rescore_every}"
        if self.selection_scope == "global":
            raise ValueError(
                f"{name} does not go with selection_scope='global': each process plans its own candidates before they "
                "are loaded. Set selection_scope to local, or selection_rescore_every to 1."
            )
        if self.accelerator_config.dispatch_batches:  # type: ignore[union-attr]  # read by `super().__post_init__`
            raise ValueError(
                f"{name} does not go with dispatch_batches, by which one process loads for all; leave it out."
            )

    def _check_balance(self) -> None:
        settings = {name: getattr(self, name) for name in list_balance_settings()}
        for name, problem in find_balance_faults(settings, self.selection_strategy, self.train_sampling_strategy):
            raise ValueError(f"{name}={problem}.")
        rule = self.selection_strategy, self.selection_ratio, self.selection_rescore_every
        if self.selection_usage_penalty and (found := find_usage_problem(*rule)):
            raise ValueError(f"selection_usage_penalty={self.selection_usage_penalty} {found}.")

    def _read_image_size(self) -> None:
        if self.image_size is not None and find_size_fault(self.image_size) is None:
            self.image_size = ImageSizes(self.image_size).as_setting()

    def _check_resolution(self) -> None:
        settings = {name: getattr(self, name) for name in _RESOLUTION}
        settings |= {"rescore_every": self.selection_rescore_every, "reference": self.selection_reference}
        settings["encoder"] = None if self.repair is None else cast(dict, self.repair).get("encoder")
        for name, _, problem in find_resolution_faults(settings):
            raise ValueError(f"{name}={problem} (null is None in Python).")
        if self.image_size is None:
            return
        if self.accelerator_config.dispatch_batches:  # type: ignore[union-attr]  # read by `super().__post_init__`
            raise ValueError(
                f"image_size={self.image_size!r} does not go with dispatch_batches, by which one process loads for "
                "all; leave it out."
            )
        if self.ignore_data_skip and not isinstance(self.image_size, int):
            raise ValueError(
                f"image_size={self.image_size!r} does not go with ignore_data_skip, by which a resumed run counts its "
                "batches from another place; set it to False."
            )

    def _check_robust_objective(self) -> None:
        given = {name: getattr(self, name) for name in list_robust_objectives() if getattr(self, name) is not None}
        if clash := find_clash(self.selection_strategy, self.selection_ratio, given):
            raise ValueError(f"{clash[0]}={getattr(self, clash[0])!r} {clash[1]} (null is None in Python).")
        if self.repair is not None:
            selection = self.selection_strategy, self.selection_rescore_every
            if problem := find_repair_fault(cast(dict, self.repair), *selection, given):
                raise ValueError(f"repair={self.repair!r} {problem} (null is None in Python).")
        robust = self.make_robust_objective()
        if robust is None:
            return
        if self.mask_false_negatives and not robust.takes_mask:
            raise ValueError(
                f"{robust.name}={getattr(self, robust.name)!r} does not go with mask_false_negatives: its loss and "
                "its evidence count every other pair of the batch. Set one of the two otherwise."
            )
        if self.max_steps <= 0 and robust.warmup_epochs >= math.ceil(self.num_train_epochs):
            raise ValueError(
                f"{robust.name}: warmup_epochs={robust.warmup_epochs} leaves no epoch with {robust.after_warmup} in "
                f"num_train_epochs={self.num_train_epochs}; train longer, or warm up shorter."
            )

    def _check_enough_pairs(self, strategy: SelectionStrategy) -> None:
        candidates = self.per_device_train_batch_size
        loads_all = strategy.keeps_all and strategy.reference != "before"
        ratio = 1 if loads_all else self.selection_ratio
        if ratio * candidates < 2 - 1e-9:
            kept = f"{ratio * candidates:g} pair{'' if ratio * candidates == 1 else 's'}"
            raise ValueError(
                f"selection_ratio={self.selection_ratio} of per_device_train_batch_size={candidates} keeps {kept}; a "
                "contrastive loss needs at least 2. Raise one of the two."
            )

    def _read_selection_options(self) -> dict[str, Any]:
        return _read_options("selection_options", self.selection_options, example='{"variant": "momentum"}')

    def num_selected(self, num_candidates: int) -> int:
        """Return `k = round(selection_ratio * B)` for `B` candidates."""
        return round(self.selection_ratio * num_candidates)

    def make_strategy(self, own: SelectionStrategy | None = None) -> SelectionStrategy:
        """Build the strategy that the arguments describe, or return `own` with the penalty of usage."""
        if own is not None:
            set_usage_penalty(own, self.selection_usage_penalty)
            return own
        options = self._read_selection_options()
        if self.selection_strategy in ("dissect", "ncr", "scan"):
            options.setdefault("warmup_epochs", self.selection_warmup_epochs)
        if self.selection_strategy == "dissect":
            options.setdefault("history_given", self.initial_ledger is not None)
        if self.selection_strategy == "noisy_channel" and self.repair is not None:
            options["repairs"] = True
        return make_strategy(self.selection_strategy, self.selection_usage_penalty, **options)

    def selector_settings(self) -> dict[str, Any]:
        """Return the settings of an `OnlineSelector`, as its keyword arguments."""
        return {
            "ratio": self.selection_ratio,
            "scope": self.selection_scope,
            "seed": self.seed,
            "scoring_batch_size": self.scoring_batch_size,
            "scores_all": self.record_selection,
            "rescore_every": self.selection_rescore_every,
            "shard_ledger": self.shard_ledger,
            "cheap_scoring": self.make_cheap_scoring(),
            "scoring_dtype": None if self.scoring_dtype is None else getattr(torch, self.scoring_dtype),
        }

    def make_cheap_scoring(self) -> CheapScoring:
        """Build the scoring that the arguments describe; on whole pictures if the strategy scores nothing."""
        if self.selection_strategy in UNSCORED and not self.record_selection:
            return CheapScoring()
        exposure = DEFAULT_EXPOSURE if self.scoring_exposure is None else self.scoring_exposure
        return CheapScoring(self.scoring_image_size, self.scoring_patch_dropout, exposure)

    def make_objective(
        self, kind: str, num_networks: int = 1, model: nn.Module | None = None, collator: Any = None
    ) -> Objective:
        """Build the objective that the arguments describe.

        Args:
            kind: Contrastive loss of the model, "softmax" or "sigmoid".
            num_networks: Number of networks of the model, 2 for a `TwinDualEncoder`.
            model: Model that trains, for `repair`.
            collator: Collator of the run, for an encoder of `repair`.

        Raises:
            ValueError: The robust objective or the repair does not fit the model.
            OSError: The encoder of the repair cannot be read or downloaded.
        """
        repair = None
        if self.repair is not None:
            settings = _read_section("repair", self.repair)
            space = make_image_space(settings.pop("space"), settings.pop("encoder"), model, collator)
            repair = Repair(**settings, space=space)
        return Objective(kind, self.mask_false_negatives, self.make_robust_objective(), num_networks, repair)

    def make_robust_objective(self) -> RobustObjective | None:
        """Build the objective that replaces the contrastive loss; None for the contrastive loss."""
        for name, (_, make) in _ROBUST.items():
            if getattr(self, name) is not None:
                settings = _read_section(name, getattr(self, name))
                if name == "gsc":
                    settings["seed"] = self.seed
                if name == "division":
                    settings["warmup_epochs"] = getattr(self.make_strategy(), "warmup_epochs", 0)
                return make(**settings)
        return None

    def column_names(self) -> dict[str, str | None]:
        """Return the names of the columns, as keyword arguments of `hf_dissect.data.as_pairs`."""
        return {
            "image": self.image_column,
            "caption": self.caption_column,
            "sample_id": self.id_column,
            "task": self.task_column,
            "clean": self.clean_column,
        }

    def training_columns(self) -> dict[str, str | None]:
        """Return the names of the columns of the training data, which alone have weights and clusters."""
        return {**self.column_names(), "weight": self.weight_column, "balance": self.balance_column}


DEFAULT_EXPOSURE = 0.25
_RESOLUTION = ("image_size", "patch_dropout", "scoring_image_size", "scoring_patch_dropout", "scoring_exposure")
_ROBUST: dict[str, tuple[type, Callable[..., RobustObjective]]] = {
    "gsc": (GscSection, GscObjective),
    "rince": (RinceSection, RinceObjective),
    "symnce": (SymnceSection, SymnceObjective),
    "noisy_channel": (NoisyChannelSection, NoisyChannelObjective),
    "division": (DivisionSection, DivisionObjective),
}
"""Section of settings and class of each objective that may replace the contrastive loss."""


def _read_section(name: str, given: Any) -> dict[str, Any]:
    """Return the settings of an objective with the defaults of those that are not given."""
    section = RepairSection if name == "repair" else _ROBUST[name][0]
    known = list_settings(section)
    example = {first: getattr(section, first) for first in list(known)[:1]}
    options = _read_options(name, given, example=json.dumps(example))
    for unknown in options.keys() - known.keys():
        raise ValueError(
            f"{name}={given!r}: {unknown!r} is not a setting of it; allowed: {', '.join(known) or 'none'}."
        )
    options = {key: getattr(section, key) for key in known} | options
    check_values(section, options, f"{name}: ")
    return options


def _read_options(name: str, given: Any, *, example: str) -> dict[str, Any]:
    options = {} if given is None or given == "" else given
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except json.JSONDecodeError:
            pass
    if not isinstance(options, dict):
        raise ValueError(f"{name}={given!r}: must be a dict, or JSON of one, such as {example}.")
    return dict(options)
