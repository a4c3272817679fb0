"""Audit of a data set by a model: which pairs are likely to be mismatched, as a table and a page."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_dissect.auditing.embeddings import PairEmbeddings, join_embeddings
from hf_dissect.auditing.kept_pairs import ExportSettings
from hf_dissect.auditing.ledger_columns import open_ledger, read_ledger_columns
from hf_dissect.auditing.scores import FEWEST_PAIRS, MatchScores, score_matches
from hf_dissect.auditing.two_groups import TwoGroups, fit_two_groups
from hf_dissect.data.pairs import PairDataset
from hf_dissect.distillation.saved_student import is_student
from hf_dissect.models.loading import load_model_and_processor, logit_scale_and_bias
from hf_dissect.recipe.recipe import DataSection, Recipe
from hf_dissect.runs.audit_result import (
    MAX_PAGE_PAIRS,
    AuditResult,
    ScoredPairs,
    export_result,
    make_result,
    write_result,
)
from hf_dissect.runs.data_settings import change_data
from hf_dissect.runs.evaluate import make_evaluating_trainer
from hf_dissect.runs.saved_model import adapt_section, choose_data, fetch_model, load_recipe, load_split
from hf_dissect.runs.trained_pairs import TrainedPairs, find_trained_pairs
from hf_dissect.selection import compute_correlation
from hf_dissect.selection.saved_ledger import has_ledger

NOT_STREAMED = {"streaming": "an audit reads the rows more than once"}

logger = logging.getLogger(__name__)


def audit(
    checkpoint: str,
    *,
    data: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
    task_column: str | None = None,
    image_features: str | None = None,
    text_features: str | None = None,
    data_settings: Mapping[str, Any] | None = None,
    max_rows: int | None = None,
    output_dir: str | Path = "audit",
    ledger: str | Path | None = None,
    export_to: str | Path | None = None,
    keep: float | None = None,
    threshold: float | None = None,
    max_fdr: float | None = None,
    export_anyway: bool = False,
    max_page_pairs: int = MAX_PAGE_PAIRS,
    batch_size: int = 64,
    num_workers: int = 0,
) -> AuditResult:
    """Rank the pairs of a data set by how likely they are mismatched, by a trained model.

    Nothing is estimated for pairs that the run trained on. They are ranked by what the run recorded of them before it
    trained on them, where it did; see `audit_by_fit` for them.

    Args:
        checkpoint: Run folder, `checkpoint-N` folder, Hub id, or `hub:USER/REPO` to use the recipe there as well.
        data: "scenes", a local folder or file, tar shards, or a Hub data set id; None for the data of the recipe in
            the checkpoint's folder, with the noise that it injects.
        split: Split of the data.
        image_column: Column of the images; None for the usual names.
        caption_column: Column of the captions; None for the usual names.
        id_column: Column of the ids; None for that of the recipe, with its own data, or for row numbers.
        task_column: Column of the tasks, for an adapter that routes by them; None for that of the recipe, with its
            own data.
        image_features: `.npz` file of stored features, for models that read those.
        text_features: `.npz` file of stored features of the captions, for models that read those.
        data_settings: Further settings of the data by name, as in the section `data` of a recipe, such as
            `{"separator": ";", "encoding": "cp1252"}`.
        max_rows: Number of rows to audit, from the first; None for all.
        output_dir: Folder of the results; `<output_dir>-2` and so on where it holds an audit already.
        ledger: Run folder or ledger file whose columns are added; None for the ledger of the checkpoint, if it trained
            on these data.
        export_to: New folder for the data set without the suspicious pairs; None writes none.
        keep: Share of the readable pairs to keep there, in (0, 1].
        threshold: Highest `p_mismatched` to keep there, in [0, 1]; 0.5 where nothing is given.
        max_fdr: Expected share of mismatched pairs there at most, in (0, 1).
        export_anyway: True to export even if the scores separate pairs poorly, or the run trained on them.
        max_page_pairs: Number of pairs on the page at most, the most suspicious first; the table has all.
        batch_size: Number of pairs in a forward pass.
        num_workers: Number of processes that decode.

    Raises:
        RecipeError: A setting of the data is wrong.
        ValueError: Settings or data cannot be used (see `evaluate_checkpoint`), the ledger does not fit the data,
            `export_to` is not empty, fewer than 10 pairs are readable, or the scores know too little for the export.
    """
    export = ExportSettings(None if export_to is None else Path(export_to), keep, threshold, max_fdr, export_anyway)
    export.check()
    if is_student(checkpoint):
        raise ValueError(
            f"{checkpoint} is the student of a distillation, which reads no captions and cannot audit pairs; name a "
            f"CLIP-like model. To evaluate the student, run: hf-dissect evaluate {checkpoint}"
        )
    recipe = load_recipe(checkpoint) if data is None else None
    trained_by = recipe if data is None else _load_recipe_if_any(checkpoint)
    model_name = _name_model(checkpoint)
    checkpoint = fetch_model(checkpoint)
    section = choose_section(checkpoint, data, recipe)
    columns = {"image_column": image_column, "caption_column": caption_column, "task_column": task_column}
    columns |= {"id_column": id_column, "image_features": image_features, "text_features": text_features}
    section = change_data(section, data_settings, named=data is not None, options=columns, refused=NOT_STREAMED)
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
    matches = _score(embeddings, logit_scale.mean().item(), device, progress=is_first)
    is_own = data is None and split == "train"
    trained = find_trained_pairs(checkpoint, trained_by, embeddings, pairs, is_train_split=is_own, path=section.path)
    if given_ledger is not None:
        more = _read_ledger_columns(given_ledger, embeddings, pairs)
    elif is_own:
        more = _read_own_ledger_columns(checkpoint, embeddings, pairs)
    else:
        more = {}
    scored = _judge(rows, pairs, embeddings, matches, trained, more)
    result = make_result(scored, Path(output_dir))
    if not is_first:
        return result
    title = f"Audit of {recipe.name if recipe is not None else Path(str(data)).name}, split {split}"
    write_result(result, pairs, title=title, model=model_name, max_page_pairs=max_page_pairs, num_workers=num_workers)
    return export_result(result, scored, export, split)


def choose_section(checkpoint: str, data: str | None, recipe: Recipe | None) -> DataSection:
    """Return the data section to audit, which is never a stream."""
    section = DataSection(source="scenes") if data == "scenes" else choose_data(checkpoint, data, recipe)
    # Page and export read the rows once more, which a stream does not allow.
    return dataclasses.replace(section, streaming=False)


def _load_recipe_if_any(checkpoint: str) -> Recipe | None:
    try:
        return load_recipe(checkpoint)
    except (OSError, ValueError) as error:
        logger.warning("Whether the model trained on these data is not known: %s", error)
        return None


def _score(embeddings: PairEmbeddings, logit_scale: float, device: torch.device, progress: bool) -> MatchScores:
    """Return the scores of the readable pairs."""
    readable = embeddings.bad_reason == 0
    return score_matches(
        embeddings.image[readable],
        embeddings.text[readable],
        logit_scale=logit_scale,
        image_key=embeddings.image_key[readable],
        caption_key=embeddings.caption_key[readable],
        device=device,
        progress=progress,
    )


def _judge(
    rows: Any,
    pairs: PairDataset,
    embeddings: PairEmbeddings,
    matches: MatchScores,
    trained: TrainedPairs,
    more: dict[str, torch.Tensor],
) -> ScoredPairs:
    """Estimate what can be estimated: nothing for pairs that the model trained on."""
    readable = embeddings.bad_reason == 0
    learnt = trained.mask[readable]
    groups: TwoGroups | None = None
    estimates = {name: np.full(len(learnt), np.nan) for name in ("p_mismatched", "local_fdr")}
    if (~learnt).sum() >= FEWEST_PAIRS:
        groups = fit_two_groups(MatchScores(matches.score[~learnt], matches.chance))
        for name, values in estimates.items():
            values[~learnt.numpy()] = getattr(groups, name)
    score = matches.score.numpy()
    correlation = compute_correlation(embeddings.image[readable], embeddings.text[readable])
    rank = origin = None
    if trained.earlier is not None:
        earlier = trained.earlier.values[readable].numpy()
        more = {"earlier_correlation": trained.earlier.values, **more}
        rank, origin = _rank_by_earlier(score, earlier, learnt.numpy()), trained.earlier.origin
    return ScoredPairs(
        rows=rows,
        pairs=pairs,
        embeddings=embeddings,
        scores={"correlation": correlation, "score": score, **estimates},
        groups=groups,
        more=more,
        trained=trained.mask,
        rank_by=rank,
        origin_of_ranks=origin,
    )


def _rank_by_earlier(score: np.ndarray, earlier: np.ndarray, learnt: np.ndarray) -> np.ndarray:
    """Return places in [0, 1] among the pairs that were learnt, by earlier scores, and among the others, by score.

    Equal scores share a place: a correlation is at least 0, so that many are 0 before a model has learnt much.
    """
    rank = np.zeros(len(score))
    earlier = np.where(np.isnan(earlier), np.nanmedian(earlier), earlier)
    for group, values in ((learnt, earlier), (~learnt, score)):
        if group.any():
            _, number, counts = np.unique(values[group], return_inverse=True, return_counts=True)
            rank[group] = (np.cumsum(counts) - (counts + 1) / 2)[number] / group.sum()
    return rank


def _read_ledger_columns(ledger: Any, embeddings: PairEmbeddings, pairs: PairDataset) -> dict[str, torch.Tensor]:
    correlation = compute_correlation(embeddings.image, embeddings.text)
    by_row = pairs.num_samples is not None
    return read_ledger_columns(ledger, embeddings.sample_id, correlation, by_row=by_row)


def _read_own_ledger_columns(
    checkpoint: str, embeddings: PairEmbeddings, pairs: PairDataset
) -> dict[str, torch.Tensor]:
    if not has_ledger(checkpoint):
        return {}
    try:
        return _read_ledger_columns(open_ledger(checkpoint), embeddings, pairs)
    except ValueError as error:
        logger.warning("The run's ledger is left out: %s", error)
        return {}


def _name_model(checkpoint: str) -> str:
    """Return the Hub id or the name of the folder, without its path, which a published page must not show."""
    folder = Path(checkpoint).expanduser()
    return folder.resolve().name if folder.exists() else checkpoint
