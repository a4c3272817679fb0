"""The sections of a recipe: one dataclass each, every setting with its type, default, help and allowed values."""

import dataclasses
from typing import Any

from hf_dissect.recipe.model_schema import ModelSection, TextTowerSection, VisionTowerSection
from hf_dissect.selection.options import OPTIONS, SCOPES
from hf_dissect.settings import declared, list_settings, setting

__all__ = [
    "NOISE_KINDS",
    "SCOPES",
    "SOURCES",
    "STRATEGIES",
    "DataSection",
    "EvaluationSection",
    "ModelSection",
    "SelectionSection",
    "TextTowerSection",
    "TrainingSection",
    "VisionTowerSection",
    "ZeroShotSection",
]

STRATEGIES: dict[str, tuple[str, ...]] = {
    name: list_settings(options)["variant"][1].choices if hasattr(options, "variant") else ()
    for name, options in OPTIONS.items()
}
"""Variants of each strategy, the default first."""
SOURCES = ("scenes", "hub", "folder", "imagefolder", "webdataset")
NOISE_KINDS = ("random", "neighbours", "partial", "absent")


@dataclasses.dataclass
class DataSection:
    """The source of the pairs.

    Relative paths are relative to the current working directory; `image_features`, `text_features` and
    `noise_permutation` are also looked up next to the data, in `path`.
    """

    source: str = setting("scenes", "Kind of the data.", choices=SOURCES)
    path: str | None = setting(
        None,
        "Hub id, folder or shards; needed by every source but scenes. Shards may lie elsewhere "
        "(hf://datasets/<user>/<name>/train-*.tar, https://host/train-{000..123}.tar); these need streaming.",
    )
    name: str | None = setting(None, "Configuration of a Hub dataset.")
    train_split: str = setting("train", "Split for training.")
    validation_split: str | None = setting("validation", "Split evaluated during training; null: none.")
    test_split: str | None = setting("test", "Split of the final figures; null: none.")
    streaming: bool = setting(False, "Read while training instead of before it; needs training.max_steps.")
    skip_bad_shards: bool = setting(
        False,
        "Of a shard that is damaged, cut off or unreachable, train on the pairs before this place and count it, "
        "instead of an error.",
    )
    image_column: str | None = setting(
        None, "Column of the images; null: recognised by its name, such as image.", argument="image_column"
    )
    caption_column: str | None = setting(
        None,
        "Column of the caption or the list of captions; null: recognised by its name, such as caption. Of shards, a "
        "member such as txt, or a field of the JSON.",
        argument="caption_column",
    )
    id_column: str | None = setting(
        None, "Column of unique ids of the rows; null: the row number.", argument="id_column"
    )
    task_column: str | None = setting(None, "Column of the task or domain; null: none.", argument="task_column")
    clean_column: str | None = setting(
        None, "Column that is true where the caption belongs to the image; null: clean.", argument="clean_column"
    )
    weight_column: str | None = setting(
        None,
        "Column of the weights of the training pairs, numbers of at least 0 that their losses are multiplied by; "
        "evaluation ignores it; null: none.",
        argument="weight_column",
    )
    balance_column: str | None = setting(
        None,
        "Column of clusters, text or whole numbers: in each epoch, pairs of large clusters are visited less often and "
        "those of small ones more often, the number of pairs stays; a stream needs sampling_file, too; null: none.",
        argument="balance_column",
    )
    balance_strength: float = setting(
        0.5,
        "Strength s of the balance: the share of a cluster is in proportion to its size to the power of 1 - s; 0.5: "
        "the square root; 1: the same for all clusters.",
        within="[0, 1]",
        argument="balance_strength",
    )
    balance_max_visits: int = setting(
        8, "Visits of a pair in an epoch that no balance exceeds.", within="[1, inf)", argument="balance_max_visits"
    )
    sampling_file: str | None = setting(
        None,
        "Weights of pairs by cluster (balance_column) or id (id_column), 1 for a visit an epoch: a run folder with "
        "sampling.parquet, Parquet, JSON, or hub:USER/REPO; null: from the sizes of the clusters.",
        argument="sampling_file",
    )
    separator: str | None = setting(
        None, "Character between the fields of .csv and .tsv files (tab for a tab); null: the one in the header."
    )
    encoding: str | None = setting(
        None, "Encoding of text files, such as cp1252 or utf-16; null: UTF-8, or what their byte order mark says."
    )
    image_root: str | None = setting(
        None, "Folder to which the paths of pictures in a table are relative; null: the folder of the table."
    )
    class_template: str = setting(
        "a photo of a {}", "Caption of a picture in a class folder; {} or {class} stands for the name of the folder."
    )
    image_features: str | None = setting(
        None, ".npz with one (rows, dim) array a split, read by the vision tower instead of the images."
    )
    text_features: str | None = setting(
        None,
        ".npz with one (captions, dim) array a split, captions in the order of the rows and of each row's list, read "
        "by the text tower instead of the captions.",
    )
    max_train_rows: int | None = setting(None, "Train on the first rows only.", within="[1, inf)")
    max_eval_rows: int | None = setting(None, "Evaluate on the first rows only.", within="[1, inf)")
    noise_rate: float = setting(0.0, "Share of the training captions that is made wrong.", within="[0, 1)")
    noise_seed: int = setting(0, "Seed of the choice of these captions.", within="[0, inf)")
    noise_kind: str = setting(
        "random",
        "Kind of the wrong captions; random: exchanged at random; neighbours: exchanged between images whose stored "
        "features (data.image_features) are near each other; partial: one noun replaced; absent: those of images that "
        "are left out of the training data.",
        choices=NOISE_KINDS,
    )
    image_size: dict[str, Any] | str | int | None = setting(
        None,
        "Side in pixels of the training pictures, or sides by the share of the training steps from which each holds, "
        "as in {0.0: 112, 0.8: 224}; null: that of the model, which evaluation always has. The positions of a ViT "
        "tower are interpolated.",
        within="[1, inf)",
        argument="image_size",
    )
    noise_permutation: str | None = setting(None, ".npy, int (num_pairs,): pair i gets caption number order[i].")
    num_workers: int = setting(
        0, "Processes that decode and tokenise.", within="[0, inf)", argument="dataloader_num_workers"
    )
    shuffle_buffer: int = setting(
        10_000,
        "Pairs of a stream that each worker holds undecoded to shuffle them; 0: the order of the stream. Data that "
        "are not streamed are shuffled as a whole.",
        within="[0, inf)",
        argument="shuffle_buffer",
    )
    fast_decoding: bool = setting(
        False,
        "Decode a JPEG whose sides are at least four times as long as the model needs at a half, a quarter or an "
        "eighth of its size, in training and validation; this is faster and changes the pixels a little.",
        argument="fast_decoding",
    )
    scenes_train: int = setting(4096, "Training pairs of the scenes.", within="[1, inf)")
    scenes_validation: int = setting(512, "Validation pairs of the scenes; 0: no such split.", within="[0, inf)")
    scenes_test: int = setting(512, "Test pairs of the scenes; 0: no such split.", within="[0, inf)")
    scenes_image_size: int = setting(32, "Side of a scene in pixels.", within="[16, inf)")
    scenes_seed: int = setting(0, "Seed of the scenes.", within="[0, inf)")
    scenes_tasks: int = setting(
        1, "Styles the scenes are shown in by turns; with more than 1 they have a column task.", within="[1, 4]"
    )


@dataclasses.dataclass
class SelectionSection:
    """The choice of the candidates that are worth a gradient."""

    strategy: str = setting(
        "dissect",
        "Rule that chooses the candidates that train; none keeps all of them.",
        choices=tuple(STRATEGIES),
        argument="selection_strategy",
    )
    ratio: float = setting(
        0.5, "Selection ratio: kept pairs / candidates.", within="(0, 1]", argument="selection_ratio"
    )
    scope: str = setting(
        "local",
        "With several processes, local: each keeps pairs of its own candidates; global: the pairs are chosen among "
        "the candidates of all and shared out, as one process would choose from the union.",
        choices=SCOPES,
        argument="selection_scope",
    )
    warmup_epochs: int = setting(
        1,
        "Epochs that record scores before the warm-up variant of dissect, or ncr, selects by them; of scan, epochs on "
        "all candidates before its first cycle.",
        within="[0, inf)",
        argument="selection_warmup_epochs",
    )
    options: dict[str, Any] = setting(
        {}, 'Further keywords of the strategy, such as {"variant": "momentum"}.', argument="selection_options"
    )
    mask_false_negatives: bool = setting(
        False,
        "Pairs of a batch that share an image or a caption are not each other's negatives.",
        argument="mask_false_negatives",
    )
    scoring_batch_size: int | None = setting(
        None,
        "Candidates scored in one forward pass; null: the whole batch.",
        within="[1, inf)",
        argument="scoring_batch_size",
    )
    rescore_every: int = setting(
        1,
        "1: every candidate is loaded and scored in each step. m > 1: after the first two epochs the ledger decides "
        "which candidates are loaded at all: those that train, and of the others a share of 1 / m, which are scored "
        "again; pairs that the ledger does not know always are. random needs no scores and loads what trains; none is "
        "not affected.",
        within="[1, inf)",
        argument="selection_rescore_every",
    )
    shard_ledger: bool = setting(
        True,
        "With several processes and ids that are not row numbers, each process holds a part of the ledger; false: all "
        "of it. The results are the same.",
        argument="shard_ledger",
    )
    scoring_dtype: str | None = setting(
        None,
        "Type of the numbers in the forward pass that scores, by autocast; null: that of the training.",
        choices=("bfloat16", "float16"),
        argument="scoring_dtype",
    )
    usage_penalty: float = setting(
        0.0,
        "Strength by which pairs that have trained often are less likely to be kept again; 0: off.",
        within="[0, inf)",
        argument="selection_usage_penalty",
    )
    scoring_image_size: int | None = setting(
        None,
        "Side in pixels to which pictures are scaled down, on the device, in the forward pass that scores; null: as "
        "in training.",
        within="[1, inf)",
        argument="scoring_image_size",
    )
    scoring_patch_dropout: float = setting(
        0.0,
        "Share of the patches that a ViT tower drops in the forward pass that scores, the same ones of each picture; "
        "a model trained with model.patch_dropout knows such pictures.",
        within="[0, 1)",
        argument="scoring_patch_dropout",
    )
    scoring_exposure: float | None = setting(
        None,
        "Share of the steps, evenly spaced, that train on pictures of selection.scoring_image_size; null: 0.25.",
        within="[0, 1]",
        argument="scoring_exposure",
    )
    record: bool = setting(
        False,
        "Write selection.parquet, one row for each candidate and step; every candidate is then scored, also for "
        "strategies that need no scores.",
        argument="record_selection",
    )
    max_bad_fraction: float = setting(
        0.01,
        "Share of rows that cannot be used above which the run stops.",
        within="[0, 1]",
        argument="max_bad_fraction",
    )
    reference: str | None = setting(
        None,
        "Hub id or folder of the trained dual encoder that learnability, rho, jest and coreset compare with; it must "
        "read the same inputs as the model, and is neither trained nor saved.",
        argument="selection_reference",
    )
    ledger: str | None = setting(
        None,
        "Scores of the same pairs to begin with: a run folder, a checkpoint, Parquet files, or hub:USER/REPO, a data "
        "set that hf-dissect push-ledger published; null: none. With them, dissect needs no warm-up. A resumed run "
        "continues with its own ledger.",
        argument="initial_ledger",
    )


@dataclasses.dataclass
class TrainingSection:
    """Settings of the section `training` next to the fields of `transformers.TrainingArguments`."""

    average_weights: float | None = setting(
        None,
        "Share of the optimiser steps, the last ones, whose weights are averaged; their mean is the final model. 0.75 "
        "averages over the last three quarters; null: the last weights are the final model.",
        within="(0, 1]",
    )
    report_pairs: bool = setting(
        True,
        "With report_to wandb, trackio or tensorboard, also send best-kept and worst-dropped pairs, with pictures.",
    )


@dataclasses.dataclass
class ZeroShotSection:
    """Classification by class names; without a path, of the scenes (data.source: scenes)."""

    classes: list[str] = setting([], "Class names, in the order of the labels; at least one.")
    templates: list[str] = setting(["a photo of a {}."], "Captions of a class; {} stands for its name.")
    source: str | None = setting(None, "Kind of the labelled images.", choices=SOURCES[1:])
    path: str | None = setting(None, "Hub id, folder or shards of the labelled images.")
    image_column: str = setting("image", "Column of the images.")
    label_column: str = setting("label", "Column of the labels: integers, or class names.")
    split: str = setting("test", "Split that is classified.")
    separator: str | None = declared(DataSection, "separator")
    encoding: str | None = declared(DataSection, "encoding")
    image_root: str | None = declared(DataSection, "image_root")


@dataclasses.dataclass
class EvaluationSection:
    """The figures that are measured."""

    retrieval: bool = setting(True, "Recall at 1, 5 and 10 in both directions.")
    noise_detection: bool = setting(True, "Separation of mismatched pairs by the scores, where the truth is known.")
    max_train_pairs: int | None = setting(
        10_000,
        "Training pairs, chosen at random (of a stream, the first), that are scored for noise_detection when training "
        "has ended; null: all.",
        within="[2, inf)",
        argument="max_train_pairs",
    )
    zero_shot: ZeroShotSection | None = setting(None, "Zero-shot classification; null: none.")
    batch_size: int | None = setting(
        None, "Pairs a device at evaluation; null: training.per_device_eval_batch_size.", within="[1, inf)"
    )
