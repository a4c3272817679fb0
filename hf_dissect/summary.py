"""Summary of a selection run: its share of `metrics.json`, its report, and the content of its card."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_dissect.cards.privacy import hub_id
from hf_dissect.data.noise_kinds import describe_noise
from hf_dissect.data.pair_sample import sample_pairs
from hf_dissect.data.shards.skipped import find_skipped, summarize_all_skipped
from hf_dissect.distributed import Ranks
from hf_dissect.evaluation.expert_weights import (
    MAX_PAIRS,
    average_by_task,
    find_task_names,
    has_router,
    list_tasks,
    route_pairs,
)
from hf_dissect.evaluation.selection_figures import (
    compute_label_figures,
    compute_noise_figures,
    compute_selection_figures,
)
from hf_dissect.model_card import describe_model
from hf_dissect.models.adapters import describe_adapter
from hf_dissect.objective import Objective
from hf_dissect.recipe.objective_schema import list_robust_objectives
from hf_dissect.report.data import PairSample, RunSummary
from hf_dissect.report.run_files import PairReader, write_selection_report
from hf_dissect.selection import OnlineSelector
from hf_dissect.selection.loop_hooks import Batch
from hf_dissect.tracking.alerts import Alert, find_skipped_rows
from hf_dissect.tracking.selection_alerts import find_strange_estimate, find_wrong_preference
from hf_dissect.training.run_folder import list_changed_settings
from hf_dissect.training.run_state import join_over_ranks
from hf_dissect.training.task_experts import has_tasks
from hf_dissect.training.time_spent import TimeSpent
from hf_dissect.training_args import DissectTrainingArguments
from hf_dissect.training_data import count_pairs, wrap_pairs

SHOWN_SETTINGS = ("selection_strategy", "selection_ratio")
"""Settings that are shown even with their defaults."""


class SelectionSummary:
    """Reporter of a selection run, see `hf_dissect.training.summary.Summary`.

    Args:
        selector: Selector of the run.
        objective: Objective of the run.
        dataset: Training data.
        recipe: Recipe of the run; None without one.
        args: Arguments of the run.
        evaluation: Data evaluated during training, a dict of several, or None.

    """

    def __init__(
        self,
        selector: OnlineSelector,
        objective: Objective,
        dataset: Any,
        recipe: Any,
        args: DissectTrainingArguments,
        evaluation: Any = None,
    ) -> None:
        self._evaluated = {"validation": evaluation, "test": None}
        self._selector = selector
        self._objective = objective
        self._dataset = dataset
        self._recipe = recipe
        self._args = args
        self._label_figures: dict[str, float | None] = {}
        self._num_scored: int | None = None  # known after `evaluate_noise`
        self._router: dict[str, Any] | None = None  # known after `measure_router`
        self._pairs = PairReader(dataset, has_differential=selector.strategy.name == "dissect")

    def choose_evaluated(self, test: Any, validation: Any) -> Any:
        """Return the data of the final figures, those of the test if there are any, and take note of them."""
        self._evaluated |= {"validation": validation, "test": test}
        return validation if test is None else test

    def evaluate_noise(self, scored: Mapping[str, torch.Tensor]) -> dict[str, float | None]:
        """Compute the figures of noise detection by the final model, and keep those of the labels for the metrics.

        Args:
            scored: Columns `sample_id` int64, `correlation` float32 and `is_clean` bool, `(n,)` each.

        Returns:
            Figures by name, as `noise_detection_*`.
        """
        self._num_scored = len(scored["sample_id"])
        self._label_figures = compute_label_figures(self._selector.ledger, scored["sample_id"], scored["is_clean"])
        return compute_noise_figures(scored)

    def measure_router(
        self,
        model: nn.Module,
        load: Callable[[Any], Iterable[Batch]],
        prepare: Callable[[Batch], Batch],
        accelerator: Accelerator,
    ) -> None:
        """Measure the weights of a MoLA router's experts by task, and keep them for the metrics.

        They are measured on a sample of the data of the final figures; without any, or without tasks where only the
        training pairs have tasks, of the training pairs. Nothing is measured without a router.

        Args:
            model: Model of the run.
            load: Function from data to their batches.
            prepare: Function that moves a batch to the device.
            accelerator: Accelerator of the trainer.
        """
        if not has_router(model):
            return
        split = "validation" if self._evaluated["test"] is None else "test"
        parts = _list_parts(wrap_pairs(f"{split}_dataset", self._evaluated[split], self._args))
        if not any(map(has_tasks, parts)) and self._dataset is not None and (not parts or has_tasks(self._dataset)):
            split, parts = "train", [self._dataset]
        if not parts:
            return
        limit = -(-MAX_PAIRS // len(parts))
        calls = {"prepare": prepare, "autocast": accelerator.autocast, "gather": accelerator.gather_for_metrics}
        routed = []
        for pairs in parts:
            batches = load(sample_pairs(pairs, limit))
            names = find_task_names(self._dataset, pairs)
            routed.append(route_pairs(model, batches, task_names=names, limit=limit, **calls))
        counts = [count_pairs(pairs) for pairs in parts]
        total = None if None in counts else sum(filter(None, counts))
        own_names = find_task_names(self._dataset) == find_task_names(self._dataset, *parts)
        known = list_tasks(self._dataset) if own_names and any(map(has_tasks, parts)) else []
        self._router = {"split": split, "out_of": total, **average_by_task(routed, known)}

    def pop_logs(self, times: TimeSpent) -> dict[str, float]:
        """Return the figures of selection and objective since the last call, and the share of scoring in the time."""
        logs = self._selector.pop_logs() | self._objective.pop_logs()
        share = {"selection_scoring_time_share": times["scoring"] / times.total} if times["scoring"] else {}
        return logs | share

    def collect_metrics(self, model: nn.Module, log_history: list[dict]) -> dict[str, Any]:
        """Return the strategy, the figures of the selection, the adapter and the settings."""
        name, adapter = self._selector.strategy.name, describe_adapter(model)
        reference = self._selector.reference
        # An objective without settings looks like an absent one.
        bare = [name for name in list_robust_objectives() if getattr(self._args, name) == {}]
        return {
            "name": name,
            "strategy": name,
            "num_pairs": count_pairs(self._dataset),
            **({} if (noise := self._describe_noise()) is None else {"injected_noise": noise}),
            "selection": {
                **compute_selection_figures(self._selector.monitor),
                **self._selector.strategy.compute_figures(),
                **({} if self._objective.robust is None else self._objective.robust.compute_figures()),
                **self._label_figures,
            },
            **({} if reference is None else {"reference": hub_id(reference.name) or "a local model"}),
            **({} if adapter is None else {"adapter": adapter}),
            **({} if self._router is None else {"router_weights": self._router}),
            **({"scored_train_pairs": self._num_scored} if self._is_sampled() else {}),
            "settings": list_changed_settings(self._args, always=(*SHOWN_SETTINGS, *bare)),
        }

    def _describe_noise(self) -> str | None:
        """Describe the captions that the recipe makes wrong on purpose; None without any."""
        data = getattr(self._recipe, "data", None)
        if data is None:
            return None
        return describe_noise(data.noise_kind, data.noise_rate, data.noise_seed, data.noise_permutation)

    def _is_sampled(self) -> bool:
        """Return True if the figures of noise detection rest on a sample of the training pairs."""
        limit, count = self._args.max_train_pairs, count_pairs(self._dataset)
        return self._num_scored is not None and limit is not None and (count is None or count > limit)

    def gather_metrics(self, ranks: Ranks) -> dict[str, Any]:
        """Return the unreadable rows and skipped shards of all ranks; every rank calls this method."""
        figures = {"bad_rows": join_over_ranks(self._selector.bad_rows, ranks).summary()}
        own = {split: find_skipped(data) for split, data in {"train": self._dataset, **self._evaluated}.items()}
        everyone = ranks.gather_objects(own)
        skipped = {split: {shard: why for one in everyone for shard, why in one[split].items()} for split in own}
        entry = summarize_all_skipped(skipped)
        return {**figures, **({"skipped_shards": entry} if entry else {})}

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Return the recipe, the facts of the model, its base model, and the scores of the last epoch."""
        histogram = self._selector.monitor.score_histogram()
        return {"recipe": self._recipe, "histogram": histogram, **describe_model(model, self._recipe)}

    def summarize(self, metrics: dict[str, Any]) -> tuple[RunSummary, str]:
        """Return the run so far, with the unreadable rows of this process, and its title."""
        metrics = {**metrics, "bad_rows": self._selector.bad_rows.summary()}
        histogram = self._selector.monitor.score_histogram()
        pairs: dict[str, Any] = {**self.show_pairs()}
        summary = RunSummary(metrics["name"], metrics, score_histogram=histogram, **pairs)
        return summary, self._make_title(metrics)

    def show_pairs(self) -> dict[str, list[PairSample]]:
        """Return the pairs of the current epoch that are `best_kept` and `worst_dropped`."""
        return self._pairs.read(self._selector.monitor)

    def find_alerts(self, log_history: Sequence[Mapping[str, Any]], progress: float) -> list[Alert]:
        """Return the signs of a wrong preference, a strange estimate, and many unreadable rows."""
        bad_rows = self._selector.bad_rows
        return [
            *find_wrong_preference(self._selector.strategy.name, self._selector.monitor, progress),
            *find_strange_estimate(log_history),
            *find_skipped_rows(*bad_rows.count_judged(), bad_rows.max_fraction, "max_bad_fraction"),
        ]

    def write_report(self, folder: Path, metrics: dict[str, Any], log_history: list[dict]) -> None:
        """Write `report_data.json` and `report.html`."""
        title = self._make_title(metrics)
        write_selection_report(folder, metrics, log_history, self._selector.monitor, self._dataset, title)

    def _make_title(self, metrics: Mapping[str, Any]) -> str:
        return metrics["name"] if self._recipe is None else f"{self._recipe.name}: {metrics['name']}"


def _list_parts(data: Any) -> list[Any]:
    """Return one or several data sets, or none, as a list."""
    return list(data.values()) if isinstance(data, dict) else [] if data is None else [data]
