"""Audit of a data set by a model: which pairs are likely to be mismatched, as a table and a page."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from hf_dissect.auditing.embeddings import PairEmbeddings, join_embeddings
from hf_dissect.auditing.export import CleanExport, check_folder, export_clean
from hf_dissect.auditing.ledger_columns import open_ledger, read_ledger_columns
from hf_dissect.auditing.page import write_page
from hf_dissect.auditing.scores import estimate_mismatched_probability, estimate_mismatched_share, score_matches
from hf_dissect.auditing.table import build_score_table, write_table
from hf_dissect.auditing.thumbnails import write_thumbnails
from hf_dissect.data.bad_rows import BadRows
from hf_dissect.data.pairs import PairDataset
from hf_dissect.distillation.saved_student import is_student
from hf_dissect.evaluation import noise_detection_metrics
from hf_dissect.models.loading import load_model_and_processor, logit_scale_and_bias
from hf_dissect.recipe.recipe import DataSection, Recipe
from hf_dissect.runs.evaluate import make_evaluating_trainer
from hf_dissect.runs.output_folder import find_free_folder
from hf_dissect.runs.saved_model import adapt_section, choose_data, fetch_model, load_recipe, load_split
from hf_dissect.selection import compute_correlation
from hf_dissect.selection.ledger import LEDGER_FILE

logger = logging.getLogger(__name__)

SCORES_FILE, PAGE_FILE, THUMBNAILS = "scores.parquet", "audit.html", "thumbnails"
MAX_PAGE_PAIRS = 100_000
THRESHOLD = 0.5
"""Probability above which a pair counts as mismatched."""
NOTE = (
    "The score says how much more likely image and caption occur together than by chance (pointwise mutual "
    "information, in nats, estimated by the model): pairs with the lowest scores are the likeliest to be mismatched. "
    "p(mismatched) compares the score with those of images with captions of other pairs. A model that has memorised "
    "mismatched pairs does not find them."
)


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """Result of an audit.

    Attributes:
        folder: Folder with `scores.parquet`, `audit.html` and `thumbnails/`.
        table: Content of `scores.parquet`, see `build_score_table`.
        mismatched_share: Estimated share of mismatched pairs among the readable ones.
        bad_rows: Pairs that cannot be read, by reason.
        auroc: AUROC of the score; None where the truth is unknown.
        export: Result of `export_clean`; None without an export.
    """

    folder: Path
    table: pa.Table
    mismatched_share: float
    bad_rows: BadRows
    auroc: float | None = None
    export: CleanExport | None = None


def audit(
    checkpoint: str,
    *,
    data: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    task_column: str | None = None,
    image_features: str | None = None,
    text_features: str | None = None,
    max_rows: int | None = None,
    output_dir: str | Path = "audit",
    ledger: str | Path | None = None,
    export_to: str | Path | None = None,
    keep: float | None = None,
    threshold: float | None = None,
    max_page_pairs: int = MAX_PAGE_PAIRS,
    batch_size: int = 64,
    num_workers: int = 0,
) -> AuditResult:
    """Rank the pairs of a data set by how likely they are mismatched.

    Args:
        checkpoint: Run folder, `checkpoint-N` folder, Hub id, or `hub:USER/REPO` to use the recipe there as well.
        data: "scenes", a local folder or file, tar shards, or a Hub data set id; None for the data of the recipe in
            the checkpoint's folder, with the noise that it injects.
        split: Split of the data.
        image_column: Column of the images; None for the usual names.
        caption_column: Column of the captions; None for the usual names.
        task_column: Column of the tasks, for an adapter that routes by them; None for that of the recipe, with its
            own data.
        image_features: `.npz` file of stored features, for models that read those.
        text_features: `.npz` file of stored features of the captions, for models that read those.
        max_rows: Number of rows to audit, from the first; None for all.
        output_dir: Folder of the results; `<output_dir>-2` and so on where it holds an audit already.
        ledger: Run folder or ledger file whose columns are added; None for the ledger of the checkpoint, if it trained
            on these data.
        export_to: New folder for the data set without the suspicious pairs; None writes none.
        keep: Share of the readable pairs to keep there, in (0, 1].
        threshold: Highest `p_mismatched` to keep there, in [0, 1]; 0.5 where neither is given.
        max_page_pairs: Number of pairs on the page at most, the most suspicious first; the table has all.
        batch_size: Number of pairs in a forward pass.
        num_workers: Number of processes that decode.

    Raises:
        ValueError: Settings or data cannot be used (see `evaluate_checkpoint`), the ledger does not fit the data,
            `export_to` is not empty, or fewer than 10 pairs are readable.
    """
    _check_export(export_to, keep, threshold)
    if is_student(checkpoint):
        raise ValueError(
            f"{checkpoint} is the student of a distillation, which reads no captions and cannot audit pairs; name a "
            f"CLIP-like model. To evaluate the student, run: hf-dissect evaluate {checkpoint}"
        )
    recipe = load_recipe(checkpoint) if data is None else None
    model_name = _name_model(checkpoint)
    checkpoint = fetch_model(checkpoint)
    columns = {"image_column": image_column, "caption_column": caption_column, "task_column": task_column}
    columns |= {"image_features": image_features, "text_features": text_features}
    section = _choose_section(checkpoint, data, recipe)
    section = adapt_section(section, max_rows=max_rows, **columns)
    given_ledger = None if ledger is None else open_ledger(ledger)
    rows = load_split(section, split, whole=data is not None)
    model, processor = load_model_and_processor(name_or_path=checkpoint)
    with make_evaluating_trainer(checkpoint, model, processor, rows, section, batch_size, num_workers) as trainer:
        pairs = cast(PairDataset, trainer.eval_dataset)
        is_first, device = trainer.is_world_process_zero(), trainer.args.device
        batches = trainer.get_eval_dataloader(pairs)
        batches = tqdm(batches, desc="reading pairs", unit="batch", disable=not is_first)
        embeddings = join_embeddings(trainer.score_batches(batches), trainer.accelerator.gather_for_metrics)
    logit_scale, _ = logit_scale_and_bias(model)
    scores, share = _score(embeddings, logit_scale.mean().item(), device, progress=is_first)
    if given_ledger is not None:
        more = _read_ledger_columns(given_ledger, embeddings, pairs)
    elif data is None and split == "train":
        more = _read_own_ledger_columns(checkpoint, embeddings, pairs)
    else:
        more = {}
    table = build_score_table(pairs, embeddings, scores, more)
    bad_rows = BadRows(1.0, len(pairs))
    bad_rows.add(embeddings.sample_id, embeddings.bad_reason)
    auroc = _compute_auroc(embeddings, scores["score"])
    result = AuditResult(_choose_folder(Path(output_dir)), table, share, bad_rows, auroc)
    if not is_first:
        return result
    name = recipe.name if recipe is not None else Path(str(data)).name
    _write(result, pairs, f"Audit of {name}, split {split}", model_name, max_page_pairs, num_workers)
    if export_to is None:
        return result
    kept = np.zeros(len(pairs), bool)
    kept[_find_readable(embeddings).numpy()] = _choose_kept(scores, keep, threshold)
    return dataclasses.replace(result, export=export_clean(Path(export_to), rows, pairs, kept, split=split))


def _check_export(export_to: str | Path | None, keep: float | None, threshold: float | None) -> None:
    for name, value in (("keep", keep), ("threshold", threshold)):
        if value is not None and export_to is None:
            raise ValueError(f"--{name} is a setting of --export-clean; name a folder with --export-clean as well.")
    if keep is not None and threshold is not None:
        raise ValueError("--keep and --threshold both choose the pairs to keep; give one of them.")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"--keep {keep} is not allowed; allowed: a share of the pairs, above 0 and at most 1.")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"--threshold {threshold} is not allowed; allowed: a probability, from 0 to 1.")
    if export_to is not None:
        check_folder(Path(export_to))


def _choose_section(checkpoint: str, data: str | None, recipe: Recipe | None) -> DataSection:
    section = DataSection(source="scenes") if data == "scenes" else choose_data(checkpoint, data, recipe)
    # Page and export read the rows once more, which a stream does not allow.
    return dataclasses.replace(section, streaming=False)


def _find_readable(embeddings: PairEmbeddings) -> torch.Tensor:
    """Return a mask of the readable pairs, bool `(number of pairs,)`."""
    return embeddings.bad_reason == 0


def _score(
    embeddings: PairEmbeddings, logit_scale: float, device: torch.device, progress: bool
) -> tuple[dict[str, Any], float]:
    """Return the columns of scores of the readable pairs, and the estimated share of mismatched ones."""
    readable = _find_readable(embeddings)
    image, text = embeddings.image[readable], embeddings.text[readable]
    matches = score_matches(
        image,
        text,
        logit_scale=logit_scale,
        image_key=embeddings.image_key[readable],
        caption_key=embeddings.caption_key[readable],
        device=device,
        progress=progress,
    )
    scores = {
        "correlation": compute_correlation(image, text),
        "score": matches.score,
        "p_mismatched": estimate_mismatched_probability(matches),
    }
    return scores, estimate_mismatched_share(matches)


def _compute_auroc(embeddings: PairEmbeddings, score: torch.Tensor) -> float | None:
    if embeddings.is_clean is None:
        return None
    return noise_detection_metrics(score, embeddings.is_clean[_find_readable(embeddings)])["auroc"]


def _read_ledger_columns(ledger: Any, embeddings: PairEmbeddings, pairs: PairDataset) -> dict[str, torch.Tensor]:
    correlation = compute_correlation(embeddings.image, embeddings.text)
    by_row = pairs.num_samples is not None
    return read_ledger_columns(ledger, embeddings.sample_id, correlation, by_row=by_row)


def _read_own_ledger_columns(
    checkpoint: str, embeddings: PairEmbeddings, pairs: PairDataset
) -> dict[str, torch.Tensor]:
    if not (Path(checkpoint) / LEDGER_FILE).is_file():
        return {}
    try:
        return _read_ledger_columns(open_ledger(checkpoint), embeddings, pairs)
    except ValueError as error:
        logger.warning("The run's ledger is left out: %s", error)
        return {}


def _choose_kept(scores: dict[str, Any], keep: float | None, threshold: float | None) -> np.ndarray:
    """Return a mask of the readable pairs to keep, bool `(number of readable pairs,)`."""
    if keep is None:
        return scores["p_mismatched"] <= (THRESHOLD if threshold is None else threshold)
    best_first = np.argsort(-scores["score"].numpy(), kind="stable")
    kept = np.zeros(len(best_first), bool)
    kept[best_first[: max(1, round(keep * len(best_first)))]] = True
    return kept


def _name_model(checkpoint: str) -> str:
    """Return the Hub id or the name of the folder, without its path, which a published page must not show."""
    folder = Path(checkpoint).expanduser()
    return folder.resolve().name if folder.exists() else checkpoint


def _choose_folder(folder: Path) -> Path:
    """Return the folder, or the first of `<folder>-2`, `-3`, ... that holds no audit yet."""
    free = find_free_folder(folder, lambda path: (path / SCORES_FILE).exists())
    if free != folder:
        logger.warning("%s already holds an audit; this one goes to %s.", folder, free)
    return free


def _write(
    result: AuditResult, pairs: PairDataset, title: str, model: str, max_page_pairs: int, num_workers: int
) -> None:
    folder, table = result.folder, result.table
    folder.mkdir(parents=True, exist_ok=True)
    write_table(table, folder / SCORES_FILE)
    num_readable = len(table) - len(result.bad_rows)
    shown = table.slice(0, min(num_readable, max_page_pairs))
    unpictured = []
    if pairs.has_pictures:
        unpictured = write_thumbnails(folder / THUMBNAILS, pairs, _find_indices(pairs, shown), num_workers)
    notes = [NOTE]
    if len(shown) < num_readable:
        notes.append(f"The {len(shown):,} most suspicious pairs are shown; scores.parquet has all {len(table):,}.")
    if "ledger_differential" in table.column_names:
        notes.append("The differential is the score of the pair in the run's history minus its correlation now.")
    write_page(
        folder / PAGE_FILE,
        shown,
        title=title,
        facts=_list_facts(result, num_readable, model),
        notes=notes,
        bad_rows=result.bad_rows,
        pictures=THUMBNAILS if pairs.has_pictures else None,
        unpictured=unpictured,
    )


def _list_facts(result: AuditResult, num_readable: int, model: str) -> Sequence[tuple[str, str]]:
    likely = int((result.table["p_mismatched"].to_numpy(zero_copy_only=False) > THRESHOLD).sum())
    facts = [
        ("Pairs", f"{num_readable:,}"),
        ("Unreadable", f"{len(result.bad_rows):,}"),
        ("Estimated mismatched", f"{result.mismatched_share:.1%}"),
        (f"Above p = {THRESHOLD}", f"{likely:,}"),
        ("Model", model),
    ]
    return facts if result.auroc is None else [*facts, ("AUROC of the score", f"{result.auroc:.3f}")]


def _find_indices(pairs: PairDataset, shown: pa.Table) -> list[int]:
    """Return the indices in the data set of the pairs of a table."""
    first = np.searchsorted(pairs.row_of_pair, shown["row"].to_numpy())
    return (first + shown["place"].to_numpy()).tolist()
