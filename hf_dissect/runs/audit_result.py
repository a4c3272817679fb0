"""Result of an audit, and how it is written: the table, the page with its pictures, and the export."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from hf_dissect.auditing.embeddings import PairEmbeddings
from hf_dissect.auditing.export import CleanExport, export_clean
from hf_dissect.auditing.kept_pairs import LEAST_SEPARATION, THRESHOLD, ExportSettings
from hf_dissect.auditing.page import write_page
from hf_dissect.auditing.sources import read_source_columns
from hf_dissect.auditing.table import build_score_table, write_table
from hf_dissect.auditing.thumbnails import write_thumbnails
from hf_dissect.auditing.two_groups import TwoGroups
from hf_dissect.data.bad_rows import BadRows
from hf_dissect.data.pairs import PairDataset
from hf_dissect.evaluation import noise_detection_metrics
from hf_dissect.runs.output_folder import find_free_folder

logger = logging.getLogger(__name__)

SCORES_FILE, PAGE_FILE, THUMBNAILS = "scores.parquet", "audit.html", "thumbnails"
MAX_PAGE_PAIRS = 100_000
NOTE = (
    "The score says how much more likely image and caption occur together than by chance (pointwise mutual "
    "information, in nats, estimated by the model): pairs with the lowest scores are the likeliest to be mismatched. "
    "p(mismatched) compares the score with those of images with captions of other pairs, and so does the local false "
    "discovery rate. Mismatched captions that nearly fit, such as those of a similar image, are hardly found, and "
    "are not in the estimates."
)


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """Result of an audit.

    Attributes:
        folder: Folder with `scores.parquet`, `audit.html` and `thumbnails/`.
        table: Content of `scores.parquet`, see `build_score_table`.
        mismatched_share: Estimated share of mismatched pairs among the readable ones that the model did not train on;
            None where there are too few of these.
        interval: Ends between which that share lies with a probability of 95 %; None likewise.
        separation: AUROC of pairs that belong together against recombined ones, estimated without any truth;
            None likewise.
        bad_rows: Pairs that cannot be read, by reason.
        num_trained: Number of pairs that the model trained on.
        origin_of_ranks: Origin of the scores that rank the pairs that the model trained on; None for the model itself.
        auroc: AUROC of the ranking; None where the truth is unknown.
        export: Result of `export_clean`; None without an export.
    """

    folder: Path
    table: pa.Table
    mismatched_share: float | None
    interval: tuple[float, float] | None
    separation: float | None
    bad_rows: BadRows
    num_trained: int = 0
    origin_of_ranks: str | None = None
    auroc: float | None = None
    export: CleanExport | None = None

    @property
    def is_separated(self) -> bool:
        """True if the scores separate pairs well enough from recombined ones to estimate and export."""
        return self.separation is not None and self.separation >= LEAST_SEPARATION

    def describe_share(self) -> str:
        """Return what is known of the share of mismatched pairs, in words."""
        if self.mismatched_share is None or self.interval is None or self.separation is None:
            return "not known: the model trained on these pairs, and may have learnt mismatched ones by heart"
        low, high = self.interval
        if self.is_separated:
            of = " of those that the model did not train on" if self.num_trained else ""
            return f"about {self.mismatched_share:.1%}{of} (95 %: {low:.1%} to {high:.1%})"
        return f"not known, between {low:.0%} and {high:.0%}: the model hardly separates pairs from recombined ones"


@dataclasses.dataclass(frozen=True)
class ScoredPairs:
    """All that an audit knows of `n` pairs, of which `r` are readable.

    Attributes:
        rows: Data set with all its columns, its pictures undecoded.
        pairs: Pairs of `rows`.
        embeddings: Keys, problems and truth of the pairs.
        scores: Columns of the readable pairs, `(r,)` each, with `score`.
        groups: Estimates of the readable pairs that the model did not train on; None where these are too few.
        more: Further columns, `(n,)` each.
        trained: True for a pair that the model trained on, bool `(n,)`; None where it trained on none.
        rank_by: Values of the readable pairs that rank them instead of the score, `(r,)`; None for the score.
        origin_of_ranks: Origin of `rank_by`.
    """

    rows: datasets.Dataset
    pairs: PairDataset
    embeddings: PairEmbeddings
    scores: Mapping[str, torch.Tensor | np.ndarray]
    groups: TwoGroups | None
    more: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    trained: torch.Tensor | None = None
    rank_by: np.ndarray | None = None
    origin_of_ranks: str | None = None


def make_result(scored: ScoredPairs, output_dir: Path) -> AuditResult:
    """Make the result of an audit, in a folder that holds none yet; write nothing."""
    embeddings, groups = scored.embeddings, scored.groups
    rank = np.asarray(scored.scores["score"]) if scored.rank_by is None else scored.rank_by
    sources = read_source_columns(scored.rows, scored.pairs)
    more = dict(scored.more)
    num_trained = 0
    if scored.trained is not None and scored.trained.any():
        num_trained = int(scored.trained.sum())
        more = {"trained_on": scored.trained, **more}
    table = build_score_table(scored.pairs, embeddings, scored.scores, more, sources, rank)
    bad_rows = BadRows(1.0, len(scored.pairs))
    bad_rows.add(embeddings.sample_id, embeddings.bad_reason, embeddings.problems)
    auroc = None
    if embeddings.is_clean is not None:
        truth = embeddings.is_clean[embeddings.bad_reason == 0]
        auroc = noise_detection_metrics(torch.from_numpy(rank), truth)["auroc"]
    return AuditResult(
        folder=_choose_folder(output_dir),
        table=table,
        mismatched_share=None if groups is None else groups.share,
        interval=None if groups is None else groups.interval,
        separation=None if groups is None else groups.separation,
        bad_rows=bad_rows,
        num_trained=num_trained,
        origin_of_ranks=scored.origin_of_ranks,
        auroc=auroc,
    )


def write_result(
    result: AuditResult, pairs: PairDataset, *, title: str, model: str, max_page_pairs: int, num_workers: int
) -> None:
    """Write table, page and pictures.

    Args:
        result: Result to write.
        pairs: Pairs of the audit.
        title: Heading of the page.
        model: Name of the model on the page.
        max_page_pairs: Number of pairs on the page at most, the most suspicious first.
        num_workers: Number of threads that decode.
    """
    folder, table = result.folder, result.table
    folder.mkdir(parents=True, exist_ok=True)
    write_table(table, folder / SCORES_FILE)
    num_readable = len(table) - len(result.bad_rows)
    shown = table.slice(0, min(num_readable, max_page_pairs))
    unpictured = []
    if pairs.has_pictures:
        unpictured = write_thumbnails(folder / THUMBNAILS, pairs, _find_indices(pairs, shown), num_workers)
    write_page(
        folder / PAGE_FILE,
        shown,
        title=title,
        facts=_list_facts(result, num_readable, model),
        notes=_list_notes(result, len(shown), num_readable),
        bad_rows=result.bad_rows,
        pictures=THUMBNAILS if pairs.has_pictures else None,
        unpictured=unpictured,
    )


def export_result(result: AuditResult, scored: ScoredPairs, settings: ExportSettings, split: str) -> AuditResult:
    """Write the data set without the suspicious pairs, where the settings ask for it.

    Returns:
        The result with its export.

    Raises:
        ValueError: The scores know too little, see `ExportSettings.check_scores`, or no pair is kept.
    """
    if settings.folder is None:
        return result
    settings.check_scores(scored.groups, result.num_trained, result.folder)
    rank = np.asarray(scored.scores["score"]) if scored.rank_by is None else scored.rank_by
    kept = np.zeros(len(scored.pairs), bool)
    kept[(scored.embeddings.bad_reason == 0).numpy()] = settings.choose(rank, scored.groups)
    exported = export_clean(settings.folder, scored.rows, scored.pairs, kept, split=split)
    return dataclasses.replace(result, export=exported)


def _choose_folder(folder: Path) -> Path:
    """Return the folder, or the first of `<folder>-2`, `-3`, ... that holds no audit yet."""
    free = find_free_folder(folder, lambda path: (path / SCORES_FILE).exists())
    if free != folder:
        logger.warning("%s already holds an audit; this one goes to %s.", folder, free)
    return free


def _list_notes(result: AuditResult, num_shown: int, num_readable: int) -> list[str]:
    notes = [NOTE]
    if result.num_trained:
        ranks = result.origin_of_ranks or "the model as it is now, which finds nothing that it has learnt by heart"
        notes.append(
            f"The model trained on {result.num_trained:,} of these pairs. Nothing is said of how likely those are "
            f"mismatched. They are ranked by: {ranks}. To find mismatched ones among them, run: hf-dissect audit --fit"
        )
    if num_shown < num_readable:
        notes.append(
            f"The {num_shown:,} most suspicious pairs are shown; scores.parquet has all {len(result.table):,}."
        )
    if "ledger_differential" in result.table.column_names:
        notes.append("The differential is the score of the pair in the run's history minus its correlation now.")
    return notes


def _list_facts(result: AuditResult, num_readable: int, model: str) -> Sequence[tuple[str, str]]:
    likely = int((result.table["p_mismatched"].to_numpy(zero_copy_only=False) > THRESHOLD).sum())
    facts = [
        ("Pairs", f"{num_readable:,}"),
        ("Unreadable", f"{len(result.bad_rows):,}"),
        ("Estimated mismatched", result.describe_share()),
        (f"Above p = {THRESHOLD}", f"{likely:,}"),
    ]
    if result.separation is not None:
        facts.append(("AUROC against recombined pairs, estimated", f"{result.separation:.2f}"))
    if result.num_trained:
        facts.append(("The model trained on", f"{result.num_trained:,}"))
    facts.append(("Model", model))
    return facts if result.auroc is None else [*facts, ("AUROC of the ranking", f"{result.auroc:.3f}")]


def _find_indices(pairs: PairDataset, shown: pa.Table) -> list[int]:
    """Return the indices in the data set of the pairs of a table."""
    first = np.searchsorted(pairs.row_of_pair, shown["row"].to_numpy())
    return (first + shown["place"].to_numpy()).tolist()
