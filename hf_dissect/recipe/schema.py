"""What a recipe may say: one dataclass a section, each setting with its type, default, meaning and allowed values."""

import copy
import dataclasses
from typing import Any

# The variants of each strategy, the default first. Kept here as text so that reading a recipe needs no torch.
STRATEGIES: dict[str, tuple[str, ...]] = {
    "dissect": ("warmup", "momentum"),
    "random": (),
    "small_loss": (),
    "big_loss": (),
    "clipscore": (),
    "ncr": (),
    "gsc": (),
    "none": (),
}
SCOPES = ("local", "global")
SOURCES = ("scenes", "hub", "folder", "imagefolder", "webdataset")


def setting(default: Any, help: str, *, choices: tuple = (), within: str = "") -> Any:
    """A dataclass field of a recipe.

    Args:
        default: the value when the recipe does not say; lists and dicts are copied.
        help: what it does, one sentence.
        choices: the allowed values (of each element, for a list).
        within: the allowed interval in mathematical notation, such as "(0, 1]" (of each element, for a list).
    """
    metadata = {"help": help, "choices": choices, "within": within}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class ModelSection:
    """Which dual encoder is trained, and on how long captions."""

    name_or_path: str | None = setting(None, "Hub id or folder of a trained model; this or config.")
    config: dict[str, Any] | None = setting(
        None, "Configuration (with model_type) of a model trained from scratch; this or name_or_path."
    )
    tokenizer: str | None = setting(
        None, "Hub id or folder of a tokenizer; null: the model's own, or one trained here."
    )
    vocab_size: int = setting(
        4096,
        "Size of the BPE vocabulary trained on the training captions (from scratch, no tokenizer).",
        within="[2, inf)",
    )
    max_caption_length: int | None = setting(
        None, "Tokens after which a caption is cut; null: what the text tower can read.", within="[3, inf)"
    )
    freeze: str | None = setting(
        None, "The tower whose weights stay as they are, and that gets no adapter.", choices=("vision", "text")
    )
    trust_remote_code: bool = setting(False, "Whether code from the model's repository may run.")
    second_name_or_path: str | None = setting(
        None,
        "Hub id or folder that the second network of objective.gsc.dual starts from; null: with config, one more of "
        "random weights.",
    )


@dataclasses.dataclass
class DataSection:
    """Where the pairs come from.

    Relative paths are relative to the current working directory; `image_features` and `noise_permutation` are also
    looked up beside the data, in `path`.
    """

    source: str = setting("scenes", "What kind of data it is.", choices=SOURCES)
    path: str | None = setting(
        None,
        "Hub id, folder or shards; needed by every source but scenes. Shards may lie elsewhere "
        "(hf://datasets/<user>/<name>/train-*.tar, https://host/train-{000..123}.tar); these need streaming.",
    )
    name: str | None = setting(None, "Configuration of a Hub dataset.")
    train_split: str = setting("train", "Split that is trained on.")
    validation_split: str | None = setting("validation", "Split evaluated during training; null: there is none.")
    test_split: str | None = setting("test", "Split of the final figures; null: there is none.")
    streaming: bool = setting(False, "Read while training instead of before it; needs training.max_steps.")
    image_column: str | None = setting(None, "Column of the images; null: recognise it.")
    caption_column: str | None = setting(None, "Column of the caption or the list of captions; null: recognise it.")
    id_column: str | None = setting(None, "Column that identifies a row; null: the row number.")
    task_column: str | None = setting(None, "Column of the task or domain; null: none.")
    clean_column: str | None = setting(None, "Column that tells whether a caption truly belongs; null: recognise it.")
    image_features: str | None = setting(
        None, ".npz with one (rows, dim) array a split, read by the vision tower instead of the images."
    )
    max_train_rows: int | None = setting(None, "Train on the first rows only.", within="[1, inf)")
    max_eval_rows: int | None = setting(None, "Evaluate on the first rows only.", within="[1, inf)")
    noise_rate: float = setting(0.0, "Share of the training captions that is shuffled.", within="[0, 1)")
    noise_seed: int = setting(0, "Seed of the shuffling.", within="[0, inf)")
    noise_permutation: str | None = setting(None, ".npy, int (num_pairs,): pair i gets caption number order[i].")
    num_workers: int = setting(0, "Processes that decode and tokenise.", within="[0, inf)")
    shuffle_buffer: int = setting(
        10_000, "Pairs of a stream that each worker holds undecoded to shuffle them; 0: none.", within="[0, inf)"
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
    """Which candidates of a batch are worth a gradient."""

    strategy: str = setting("dissect", "The rule that chooses.", choices=tuple(STRATEGIES))
    ratio: float = setting(0.5, "Selection ratio: kept pairs / candidates.", within="(0, 1]")
    scope: str = setting(
        "local", "With several processes: each keeps pairs of its own candidates, or all of the union.", choices=SCOPES
    )
    warmup_epochs: int = setting(1, "Epochs that record scores before the warm-up variant selects.", within="[0, inf)")
    options: dict[str, Any] = setting({}, "Keywords of the strategy, such as variant: momentum.")
    mask_false_negatives: bool = setting(
        False, "Pairs of a batch that share an image or a caption are not each other's negatives."
    )
    scoring_batch_size: int | None = setting(
        None, "Candidates scored in one forward pass; null: all of the batch.", within="[1, inf)"
    )
    record: bool = setting(False, "Write selection.parquet: every candidate of every step.")
    max_bad_fraction: float = setting(0.01, "Share of unreadable rows above which the run stops.", within="[0, 1]")
    ledger: str | None = setting(
        None, "Scores of the same pairs to begin with: a run folder, Parquet files, or hub:USER/REPO; null: none."
    )


@dataclasses.dataclass
class GscSection:
    """Soft labels for pairs that may be mismatched (GSC, CVPR 2024), and the loss that they weight."""

    gamma: float = setting(0.01, "Weight of the loss within the modalities.", within="[0, inf)")
    beta: float = setting(0.7, "Share of the new evidence in a label, at each epoch.", within="(0, 1]")
    temperature: float = setting(0.07, "Of the softmax over the cosines, in place of the model's.", within="(0, inf)")
    warmup_epochs: int = setting(1, "Epochs that train by the contrastive loss first.", within="[0, inf)")
    dual: bool = setting(
        False, "Whether two networks train, each with the other's labels (GSC+); costs twice as much."
    )


@dataclasses.dataclass
class ObjectiveSection:
    """How the loss is computed."""

    grad_cache_chunk_size: int | None = setting(
        None,
        "Pairs that go through the model at a time with gradient, the loss being that of all (GradCache); null: all.",
        within="[1, inf)",
    )
    gsc: GscSection | None = setting(None, "Soft labels; null: the contrastive loss throughout.")


@dataclasses.dataclass
class ZeroShotSection:
    """Classification by class names; without a path, of the scenes (data.source: scenes)."""

    classes: list[str] = setting([], "Class names, in the order of the labels; at least one.")
    templates: list[str] = setting(["a photo of a {}."], "Captions of a class; {} stands for its name.")
    source: str | None = setting(None, "What kind of data the labelled images are.", choices=SOURCES[1:])
    path: str | None = setting(None, "Hub id, folder or shards of the labelled images.")
    image_column: str = setting("image", "Column of the images.")
    label_column: str = setting("label", "Column of the labels: integers, or class names.")
    split: str = setting("test", "Split that is classified.")


@dataclasses.dataclass
class EvaluationSection:
    """What is measured."""

    retrieval: bool = setting(True, "Recall at 1, 5 and 10 in both directions.")
    noise_detection: bool = setting(True, "How well the scores tell mismatched pairs, when the truth is known.")
    zero_shot: ZeroShotSection | None = setting(None, "Zero-shot classification; null: none.")
    batch_size: int | None = setting(
        None, "Pairs a device at evaluation; null: training.per_device_eval_batch_size.", within="[1, inf)"
    )


@dataclasses.dataclass
class CompareSection:
    """What `hf-dissect compare` runs: every strategy with every seed."""

    strategies: list[str] = setting(["none", "random", "dissect"], "Strategies, as `name` or `name:variant`.")
    seeds: list[int] = setting([0], "Seeds, each a run.", within="[0, 4294967295]")


def parse_strategy(spec: str) -> tuple[str, str | None]:
    """Name and variant of a strategy written `name` or `name:variant`; a bare name means its first variant.

    Returns:
        Such as `("dissect", "momentum")`; the variant is None for a strategy that has none.

    Raises:
        ValueError: for an unknown name or variant; the message lists what is allowed.
    """
    name, colon, variant = spec.partition(":")
    variants = STRATEGIES.get(name, ())
    if name not in STRATEGIES or (colon and variant not in variants):
        allowed = [*STRATEGIES, *(f"{key}:{value}" for key, values in STRATEGIES.items() for value in values)]
        raise ValueError(f"{spec!r} is not a strategy; allowed: {', '.join(allowed)}")
    return name, variant or (variants[0] if variants else None)
