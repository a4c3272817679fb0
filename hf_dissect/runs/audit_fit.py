"""Audit of a data set without a model: encoders are fitted to one part of it and judge the other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from hf_dissect.auditing.cross_fit import FitSettings, cross_fit
from hf_dissect.auditing.kept_pairs import ExportSettings
from hf_dissect.auditing.two_groups import fit_two_groups
from hf_dissect.data import as_pairs
from hf_dissect.data.pairs import PairDataset
from hf_dissect.recipe.recipe import DataSection
from hf_dissect.runs.audit import NOT_STREAMED, choose_section
from hf_dissect.runs.audit_result import (
    MAX_PAGE_PAIRS,
    AuditResult,
    ScoredPairs,
    export_result,
    make_result,
    write_result,
)
from hf_dissect.runs.data_settings import change_data
from hf_dissect.runs.fit_inputs import load_image_encoder, read_inputs
from hf_dissect.runs.saved_model import adapt_section, fetch_model, load_split


def audit_by_fit(
    data: str | DataSection,
    *,
    model: str | None = None,
    folds: int = 2,
    seed: int = 0,
    settings: FitSettings | None = None,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    id_column: str | None = None,
    image_features: str | None = None,
    data_settings: Mapping[str, Any] | None = None,
    max_rows: int | None = None,
    output_dir: str | Path = "audit",
    export_to: str | Path | None = None,
    keep: float | None = None,
    threshold: float | None = None,
    max_fdr: float | None = None,
    export_anyway: bool = False,
    max_page_pairs: int = MAX_PAGE_PAIRS,
    batch_size: int = 256,
    num_workers: int = 0,
) -> AuditResult:
    """Rank the pairs of a data set by how likely they are mismatched, by encoders that are fitted to it.

    The pairs are divided into folds. Small dual encoders are trained on all folds but one by the noisy-channel rule,
    which leaves out what does not fit, and judge the pairs of that one: no pair is judged by a model that met its
    image or its caption.

    Args:
        data: "scenes", a local folder or file, tar shards, or a Hub data set id; or a data section of a recipe, with
            its noise.
        model: Folder or Hub id of a trained model whose image encoder makes the features that the encoders read; None
            for stored features, or for small pictures.
        folds: Number of folds, at least 2.
        seed: Seed of folds and encoders.
        settings: Settings of the encoders.
        split: Split of the data.
        image_column: Column of the images; None for the usual names.
        caption_column: Column of the captions; None for the usual names.
        id_column: Column of the ids; None for row numbers.
        image_features: `.npz` file of stored features.
        data_settings: Further settings of the data by name, see `audit`.
        max_rows: Number of rows to audit, from the first; None for all.
        output_dir: Folder of the results; `<output_dir>-2` and so on where it holds an audit already.
        export_to: New folder for the data set without the suspicious pairs; None writes none.
        keep: Share of the readable pairs to keep there, in (0, 1].
        threshold: Highest `p_mismatched` to keep there, in [0, 1]; 0.5 where nothing is given.
        max_fdr: Expected share of mismatched pairs there at most, in (0, 1).
        export_anyway: True to export even if the scores separate pairs poorly.
        max_page_pairs: Number of pairs on the page at most, the most suspicious first; the table has all.
        batch_size: Number of pairs read at a time.
        num_workers: Number of processes that decode.

    Raises:
        RecipeError: A setting of the data is wrong.
        ValueError: Settings or data cannot be used, there are too few readable pairs, or the scores know too little
            for the export.
    """
    export = ExportSettings(None if export_to is None else Path(export_to), keep, threshold, max_fdr, export_anyway)
    export.check()
    if folds < 2:
        raise ValueError(f"--folds {folds} is not allowed; allowed: an integer of at least 2.")
    section = choose_section("", data, None) if isinstance(data, str) else data
    columns = {"image_column": image_column, "caption_column": caption_column, "id_column": id_column}
    columns["image_features"] = image_features
    section = change_data(section, data_settings, named=True, options=columns, refused=NOT_STREAMED)
    section = adapt_section(section, max_rows=max_rows, **columns)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = None if model is None else load_image_encoder(fetch_model(model), device)
    rows = load_split(section, split)
    # With an encoder, pictures are read; without one, stored features where there are any.
    stored = "image_features" if section.image_features and encoder is None else None
    names = {"image": section.image_column or stored, "caption": section.caption_column}
    names |= {"sample_id": section.id_column, "clean": section.clean_column}
    pairs = cast(PairDataset, as_pairs(rows, **names))
    embeddings, inputs = read_inputs(
        pairs, encoder=encoder, batch_size=batch_size, num_workers=num_workers, progress=True
    )
    fitted = cross_fit(inputs, folds=folds, seed=seed, settings=settings, device=device, progress=True)
    groups = fit_two_groups(fitted.matches)
    fold = torch.full((len(pairs),), -1)
    fold[embeddings.bad_reason == 0] = fitted.fold
    scored = ScoredPairs(
        rows=rows,
        pairs=pairs,
        embeddings=embeddings,
        scores={
            "correlation": fitted.correlation,
            "score": fitted.matches.score,
            "p_mismatched": groups.p_mismatched,
            "local_fdr": groups.local_fdr,
        },
        groups=groups,
        more={"fold": fold},
    )
    result = make_result(scored, Path(output_dir))
    name = Path(str(section.path or section.source)).name
    source = "small pictures" if inputs.images.dim() > 2 else "image features"
    described = f"{folds}-fold fit on {source if model is None else 'features of ' + Path(model).name}"
    write_result(
        result,
        pairs,
        title=f"Audit of {name}, split {split}",
        model=described,
        max_page_pairs=max_page_pairs,
        num_workers=num_workers,
    )
    return export_result(result, scored, export, split)
