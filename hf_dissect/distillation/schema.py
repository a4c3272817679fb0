"""The sections of the recipe of a distillation; trainer arguments read the same declarations."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_dissect.distillation.terms import METHODS, TERMS, TermWeights
from hf_dissect.recipe.schema import DataSection, SelectionSection
from hf_dissect.settings import declared, describe_problem, setting

KINDS = ("array", "image", "text")
AUTO = "auto"
"""Method that a pilot replaces by student, hinton or amid, see `hf_dissect.distillation.choose_method`."""


@dataclass
class ModalitySection:
    """A modality and its encoder."""

    column: str | None = setting(None, "Column of the data; null: the name of the section (of an auxiliary).")
    kind: str = setting("array", "Content of the column.", choices=KINDS)
    name_or_path: str | None = setting(None, "Hub id or folder of a trained encoder; this or config.")
    config: dict[str, Any] | None = setting(
        None, "Configuration (with model_type) of an encoder trained from scratch; this or name_or_path."
    )
    processor: str | None = setting(
        None, "Hub id or folder of the image processor or tokenizer; null: the encoder's own, or one made here."
    )
    standardise: bool = setting(
        True, "Standardise arrays by the training data (encoders with input_mean and input_std)."
    )
    trust_remote_code: bool = setting(False, "Allow code from the encoder's repository to run.")


@dataclass
class DistillationDataSection:
    """The source of the rows, and their division into splits."""

    source: str = setting("folder", "Kind of the data.", choices=("npz", "folder", "hub", "imagefolder"))
    path: str | None = setting(None, "File or folder of arrays (.npz), folder of tables, or Hub id.")
    name: str | None = declared(DataSection, "name")
    label_column: str = setting("label", "Column of the classes.", argument="label_column")
    train_split: str = declared(DataSection, "train_split")
    validation_split: str | None = declared(DataSection, "validation_split")
    test_split: str | None = declared(DataSection, "test_split")
    separator: str | None = declared(DataSection, "separator")
    encoding: str | None = declared(DataSection, "encoding")
    image_root: str | None = declared(DataSection, "image_root")
    group_column: str | None = setting(
        None, "Column by whose values one table is split, such as the subject; null: the data are split."
    )
    train_groups: list[Any] = setting([], "Values of group_column for training.")
    validation_groups: list[Any] = setting([], "Values of group_column evaluated during training.")
    test_groups: list[Any] = setting([], "Values of group_column for the final figures.")
    max_train_rows: int | None = declared(DataSection, "max_train_rows")
    max_eval_rows: int | None = declared(DataSection, "max_eval_rows")
    max_bad_fraction: float = declared(SelectionSection, "max_bad_fraction")
    num_workers: int = declared(DataSection, "num_workers")


@dataclass
class DistillationSettings:
    """Objective, networks and diagnostics; each setting is a trainer argument of the same name."""

    method: str = setting(
        "amid",
        "Terms of the objective to begin with; student: its task alone; auto: a pilot chooses student, hinton or "
        "amid.",
        choices=(*METHODS, AUTO),
    )
    term_weights: dict[str, Any] | str | None = setting(  # HfArgumentParser takes JSON for this type alone
        {},
        'Weights in place of the method\'s, by term, such as {"conditional_entropy": 0.5}; 0 switches a term off. '
        f"Terms: {', '.join(TERMS)}.",
    )
    weight_warmup: float = setting(
        0.0,
        "Share of the steps over which the weights of all terms but the task losses rise linearly.",
        within="[0, 1)",
    )
    temperature: float = setting(0.1, "Temperature of the cosines in the information terms.", within="(0, inf)")
    memory_bank: int = setting(
        0, "Past pairs that the information terms contrast with as well; 0: the batch alone.", within="[0, inf)"
    )
    hinton_temperature: float = setting(
        4.0, "Temperature that softens the predictions compared by the term hinton.", within="(0, inf)"
    )
    generator_anchor: float = setting(
        1.0,
        "Weight of the generator's squared error within the conditional entropy; 0: the adversary alone, which is "
        "unstable.",
        within="[0, inf)",
    )
    teacher_learns: bool = setting(
        True,
        "Train the teacher by the information terms, too. Without that there is no short cut, and no teacher that "
        "adapts.",
    )
    compared_teacher: str | None = setting(
        None,
        "What the teacher reads whose features the student learns: all modalities, or the auxiliaries alone, so that "
        "the student's own modality is no short cut; null: the auxiliaries for amid, all for the other methods.",
        choices=("all", "auxiliaries"),
    )
    standardise_compared: bool = setting(
        True,
        "Standardise features over the rows of a batch before the information terms compare them; without that, the "
        "nearly equal features at the start move together.",
    )
    classification_weight: float = setting(1.0, "Weight of the cross-entropy in each task loss.", within="[0, inf)")
    retrieval_weight: float = setting(
        0.0, "Weight of the supervised contrastive loss in each task loss.", within="[0, inf)"
    )
    retrieval_temperature: float = setting(0.1, "Temperature of the cosines in the retrieval loss.", within="(0, inf)")
    label_smoothing: float = setting(0.0, "Label smoothing of the classification.", within="[0, 1)")
    teacher_size: int = setting(128, "Size of the teacher's features.", within="[1, inf)")
    comparison_size: int = setting(64, "Size of the vectors that the information terms compare.", within="[1, inf)")
    embedding_size: int | None = setting(
        None, "Size of the embeddings for retrieval; null: the features themselves.", within="[1, inf)"
    )
    discriminator_size: int = setting(128, "Size of the discriminator's layers.", within="[1, inf)")
    discriminator_learning_rate: float = setting(
        1e-3, "Learning rate of the discriminator's own Adam, constant.", within="(0, inf)"
    )
    max_caption_length: int | None = setting(
        None, "Tokens after which a text is cut; null: the limit of the tokenizer.", within="[3, inf)"
    )
    teacher_drop: float = setting(
        0.05, "Fall of the teacher's accuracy below its best that causes a warning.", within="(0, 1)"
    )
    discriminator_ceiling: float = setting(
        0.98, "Accuracy of the discriminator above which a warning reports that it saturates.", within="(0.5, 1]"
    )
    check_reload: bool = setting(
        True,
        "Before training, save the student to a temporary folder, load it, and warn if it gives other predictions; "
        "one of more than a billion weights is not checked.",
    )

    measure_information: bool = setting(
        True,
        "Before and after training, measure on held-out rows what the teacher knows that the labels do not tell the "
        "student.",
    )
    pilot_epochs: float = setting(
        0.25, "Length of the pilot of method auto, as a share of the run's epochs.", within="(0, 1]"
    )

    @property
    def weights(self) -> TermWeights:
        """Weights of the terms: those of the method, changed by `term_weights`.

        Raises:
            ValueError: The method is "auto", which has no terms before a pilot has chosen one.
        """
        if self.method == AUTO:
            raise ValueError(
                "method='auto' has no terms of its own: a pilot chooses the method before training. Call "
                "hf_dissect.distillation.choose_method(recipe, splits) and train the method of its result, name a "
                "method, or train by the recipe (hf-dissect train, hf_dissect.runs.distil.run_distillation)."
            )
        return TermWeights(**{**vars(METHODS[self.method]), **self._term_weights()})

    @property
    def compares_auxiliaries(self) -> bool:
        """True if the student learns from what the teacher makes of the auxiliaries alone."""
        return (self.compared_teacher or ("auxiliaries" if self.method == "amid" else "all")) == "auxiliaries"

    def _term_weights(self) -> dict[str, Any]:
        return self.term_weights if isinstance(self.term_weights, dict) else {}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield name and problem of the settings that no range alone can check."""
        if not isinstance(self.term_weights, dict):
            problem = f"{self.term_weights!r} is not allowed; allowed: a mapping of {', '.join(TERMS)} to weights"
            yield "term_weights", problem
        if self.method == AUTO and self._term_weights():
            yield "term_weights", f"{self.term_weights!r} needs a method by name; auto takes the weights of its choice"
        for term, weight in self._term_weights().items():
            if unknown := describe_problem(term, str, TERMS):
                yield "term_weights", unknown
            elif impossible := describe_problem(weight, float, within="[0, inf)"):
                yield f"term_weights.{term}", impossible
        if self.classification_weight == self.retrieval_weight == 0:
            problem = f"{self.classification_weight} with retrieval_weight {self.retrieval_weight} leaves no task"
            yield "classification_weight", f"{problem}; raise one of them"
