"""Pairs of a data set that a run trained on, which its model may have learnt by heart."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from hf_dissect.auditing.embeddings import PairEmbeddings
from hf_dissect.auditing.ledger_columns import EarlierScores, open_ledger, read_earlier_scores
from hf_dissect.data import as_pairs
from hf_dissect.data.images import image_content
from hf_dissect.data.pairs import PairDataset, key_hash
from hf_dissect.recipe.recipe import Recipe
from hf_dissect.runs.saved_model import find_recipe_file, load_split
from hf_dissect.selection import SampleLedger, compute_correlation
from hf_dissect.selection.saved_ledger import has_ledger

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1000
_FEWEST_TO_COMPARE = 50
_ALIKE, _DEVIATIONS = 0.2, 5
"""Least Pearson correlation of recorded and current scores of the same pairs, and its least number of deviations.

After two epochs it was 0.46 for the training pairs of a run and -0.05 for others, after six 0.996 and -0.01.
"""


@dataclasses.dataclass(frozen=True)
class TrainedPairs:
    """Pairs that a run trained on.

    Attributes:
        mask: True for a pair whose image the run trained on, bool `(n,)`.
        earlier: Scores from before training; None if the run recorded none.
    """

    mask: torch.Tensor
    earlier: EarlierScores | None = None


def find_trained_pairs(
    checkpoint: str,
    recipe: Recipe | None,
    embeddings: PairEmbeddings,
    pairs: PairDataset,
    *,
    is_train_split: bool,
    path: str | None = None,
) -> TrainedPairs:
    """Find the pairs that the run of a checkpoint trained on.

    They are all pairs of the run's own train split; pairs whose ids, made from keys, are in the ledger; pairs whose
    image the train split of the recipe has; and, if there are none, pairs numbered as in the ledger with about the
    same correlations.

    Args:
        checkpoint: Run folder, one of its checkpoints, or a model.
        recipe: Recipe of the run; None for a model without one.
        embeddings: Embeddings of all pairs.
        pairs: The pairs.
        is_train_split: True for the train split of `recipe`, as it stands there.
        path: Path of the audited data. Training data that are not on this machine are only read if they are these.
    """
    folder = _find_run_folder(checkpoint)
    ledger = _open(folder)
    mask = torch.zeros(len(pairs), dtype=torch.bool)
    if is_train_split:
        mask[:] = True
    else:
        if ledger is not None and ledger.num_samples is None and pairs.num_samples is None:
            mask |= ~ledger.read(ledger.columns[0], embeddings.sample_id).isnan()
        if recipe is not None:
            keys = _read_image_keys(recipe, path)
            if keys is not None:
                mask |= torch.isin(embeddings.image_key, keys)
        # A picture in a file is known by its path, which differs in a copy of the data.
        if not mask.any() and ledger is not None and _is_numbered_alike(ledger, embeddings, pairs):
            mask[:] = True
    mask &= embeddings.bad_reason == 0
    # By number, a ledger speaks of pairs only where all of them are there in their order.
    fits = ledger is not None and (ledger.num_samples == pairs.num_samples)
    if not mask.any() or recipe is None or ledger is None or not fits:
        return TrainedPairs(mask)
    selection = dataclasses.asdict(recipe.selection)
    return TrainedPairs(mask, read_earlier_scores(folder or "", ledger, embeddings.sample_id, selection))


def _find_run_folder(checkpoint: str) -> Path | None:
    file = find_recipe_file(Path(checkpoint))
    return Path(checkpoint) if file is None else file.parent


def _open(folder: Path | None) -> SampleLedger | None:
    if folder is None or not has_ledger(folder):
        return None
    try:
        return open_ledger(folder)
    except ValueError as error:
        logger.warning("The run's ledger is left out: %s", error)
        return None


def _read_image_keys(recipe: Recipe, path: str | None) -> torch.Tensor | None:
    """Return the keys of the images that a run trained on, int64; None if its data cannot be read here."""
    section = dataclasses.replace(recipe.data, streaming=False)
    is_elsewhere = section.source == "hub" or "://" in (section.path or "")
    if is_elsewhere and section.path != path:
        return None  # a download of any size
    try:
        rows = load_split(section, "train")
        columns = {"image": section.image_column or ("image_features" if section.image_features else None)}
        train = cast(PairDataset, as_pairs(rows, **columns, caption=section.caption_column))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        logger.warning(
            "The data that the run trained on cannot be read, so that only its ledger is compared: %s", reason
        )
        return None
    images = train.rows.select_columns([train.columns.image])
    keys: list[int] = []
    for start in tqdm(range(0, len(images), _ROWS_AT_ONCE), desc="comparing with the training data", unit="batch"):
        batch: Any = images[start : start + _ROWS_AT_ONCE][train.columns.image]
        keys += [key_hash(content) for image in batch if (content := image_content(image)) is not None]
    return torch.tensor(keys, dtype=torch.int64)


def _is_numbered_alike(ledger: SampleLedger, embeddings: PairEmbeddings, pairs: PairDataset) -> bool:
    if ledger.num_samples is None or ledger.num_samples != pairs.num_samples or "correlation" not in ledger.columns:
        return False
    recorded = ledger.read("correlation", embeddings.sample_id)
    known = ~recorded.isnan() & (embeddings.bad_reason == 0)
    if known.sum() < _FEWEST_TO_COMPARE:
        return False
    now = compute_correlation(embeddings.image, embeddings.text)
    both = torch.stack([recorded[known], now[known]])
    return bool(torch.corrcoef(both)[0, 1] > max(_ALIKE, _DEVIATIONS / int(known.sum()) ** 0.5))
