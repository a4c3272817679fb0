"""Publication of a ledger as a data set of the Hub, so that others can filter the same pairs by its scores."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_dissect.cards.templates import render_card
from hf_dissect.data.noise_kinds import CHANGES
from hf_dissect.distillation.saved_student import is_student
from hf_dissect.hub.published_files import check_private
from hf_dissect.hub.push import Push
from hf_dissect.hub.repository import HubError, Repository
from hf_dissect.hub.shared_recipe import select_shareable
from hf_dissect.recipe.file import read_settings
from hf_dissect.selection.ledger_files import ID_COLUMN, find_scored, write_tables
from hf_dissect.selection.saved_ledger import LEDGER_FILE, SavedLedger, has_ledger, read_ledger

_TEMPLATE = "ledger.md.jinja"
_DATA_FOLDER = "data"
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
_SIZES |= {10**8: "10M<n<100M", 10**9: "100M<n<1B"}
_MEANINGS = {
    "correlation": "`max(100 * cosine, 0)` of image and caption at the last visit",
    "history": "the correlation once the pair was learnt, or its moving average: `history - correlation` is the "
    "differential, large for pairs that belong together",
    "loss": "the contrastive loss at the last visit",
    "p_clean": "probability that the pair is matched, by a mixture of two Gaussians on the losses",
    "prunable": "1 for one of the largest losses of its batch (ill-matched), -1 for one of the smallest (redundant)",
    "learnt": "1 if image and caption ranked each other first at the last visit, otherwise 0",
    "forgotten": "number of times that the pair was learnt and then not; infinite if it was never learnt",
    "evidence": "log odds of the caption against that of one stranger at the last visit, by the noisy channel",
    "planned": "value that the selection rule ranked the pair by in the last epoch that was planned",
    "planned_before": "the same in the epoch before",
    "y_cm": "soft label across the modalities; the smaller of `y_cm` and `y_im` is the trust in the pair",
    "y_im": "soft label within the modalities",
}
_SHOWN_SETTINGS = ("strategy", "ratio", "warmup_epochs", "options")


def push_ledger(
    run: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Push:
    """Publish the scores of the pairs of a run, by their ids alone: no caption, no image, no name of a file.

    Args:
        run: Run folder, or one of its checkpoints.
        repo_id: Id `USER/REPO` of the data set, or a name alone for one of the user; created where missing.
        private: Visibility of a new repository; None for the default of its owner.
        revision: Branch to write to, created where missing; None for the main branch.
        token: Token of the user; None for the one that is logged in.

    Raises:
        HubError: The folder has no ledger, like that of a distillation, or see `Repository.open` and `upload`.
    """
    folder = Path(run)
    if folder.exists() and is_student(folder):
        raise HubError(
            f"{folder} is the run of a distillation, which chooses no pairs and keeps no scores of them; publish its "
            f"student with: hf-dissect push {folder} {repo_id}"
        )
    if not has_ledger(folder):
        raise HubError(f"{folder} has no {LEDGER_FILE}; name the folder of a run, such as runs/quickstart.")
    ledger = read_ledger(folder)
    if not find_scored(ledger).any():
        raise HubError(f"{folder}: its ledger holds no score; the run has scored no pair yet.")
    recipe_file = folder / "recipe.yaml"
    settings = select_shareable(read_settings(recipe_file))[0] if recipe_file.is_file() else {}
    with tempfile.TemporaryDirectory() as place:
        tables = write_tables(ledger, Path(place))
        repository = Repository.open(repo_id, "dataset", private=private, revision=revision, token=token)
        card = format_ledger_card(ledger, settings, repository.repo_id)
        files: dict[str, Path | bytes] = {f"{_DATA_FOLDER}/{table.name}": table for table in tables}
        files["README.md"] = card.encode()
        check_private(files, folder)
        message = "Upload the scores of a run of hf_dissect"
        repository.upload(files, message, outdated=lambda path: path.startswith(f"{_DATA_FOLDER}/"))
    return Push(repository.url, repository.repo_id, sorted(files), [])


def format_ledger_card(ledger: SavedLedger, settings: Mapping[str, Any], repo_id: str) -> str:
    """Format the card of a published ledger.

    Args:
        ledger: Ledger to publish.
        settings: Settings of the run's recipe that may be shared; empty without a recipe.
        repo_id: Repository to publish in.
    """
    data, selection = (settings.get(name) or {} for name in ("data", "selection"))
    hub_data = data.get("path") if data.get("source") == "hub" else None
    count = int(find_scored(ledger).sum())
    metadata = {
        "pretty_name": f"Scores of pairs: {settings.get('name', repo_id.split('/')[-1])}",
        "tags": ["hf_dissect", "sample-selection", "image-text", "clip"],
        "size_categories": [next((size for limit, size in _SIZES.items() if count < limit), "n>1B")],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": f"{_DATA_FOLDER}/*.parquet"}]}
        ],
        **({"source_datasets": [hub_data]} if hub_data else {}),
    }
    return render_card(
        _TEMPLATE,
        metadata=yaml.safe_dump(metadata, sort_keys=False).strip(),
        name=settings.get("name"),
        repo_id=repo_id,
        id_column=ID_COLUMN,
        key_column=data.get("id_column"),
        rows=ledger.num_samples is not None,
        hub_data=hub_data,
        data={
            key: json.dumps(value) for key, value in data.items() if key in ("name", "train_split", "caption_column")
        },
        columns=[(name, _MEANINGS.get(name, "kept by the selection rule")) for name in sorted(ledger.columns)],
        selection={key: json.dumps(selection[key]) for key in _SHOWN_SETTINGS if key in selection},
        count=count,
        noise_rate=data.get("noise_rate") or 0,
        noise_verb=CHANGES.get(str(data.get("noise_kind")), CHANGES["random"]),
        noise_seed=data.get("noise_seed") or 0,
        renumbered=data.get("noise_kind") == "absent",
    )
