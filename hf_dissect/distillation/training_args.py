"""The Trainer's arguments plus those of distillation from modalities that exist at training time only."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from hf_dissect.distillation.terms import METHODS, TERMS, TermWeights
from hf_dissect.recipe.fields import problem_with
from hf_dissect.training_args import is_one_of_several_without_accelerator

RANGES = {
    "temperature": "(0, inf)",
    "retrieval_temperature": "(0, inf)",
    "hinton_temperature": "(0, inf)",
    "memory_bank": "[0, inf)",
    "generator_anchor": "[0, inf)",
    "discriminator_learning_rate": "(0, inf)",
    "discriminator_size": "[1, inf)",
    "teacher_size": "[1, inf)",
    "comparison_size": "[1, inf)",
    "embedding_size": "[1, inf)",
    "classification_weight": "[0, inf)",
    "retrieval_weight": "[0, inf)",
    "label_smoothing": "[0, 1)",
    "weight_warmup": "[0, 1)",
    "max_bad_fraction": "[0, 1]",
    "max_caption_length": "[3, inf)",
    "teacher_drop": "(0, 1)",
    "discriminator_ceiling": "(0.5, 1]",
}


def setting(default: Any, help: str) -> Any:
    """A field with its meaning."""
    if isinstance(default, dict | list):
        return field(default_factory=lambda: default.copy(), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class AuxiliaryDistillationArguments(TrainingArguments):
    """Arguments of `AuxiliaryDistillationTrainer`: all of `transformers.TrainingArguments`, and the following.

    > Objective

    Args:
        method: the terms to begin with: "student" (its task alone), "hinton", "crd", "mi_student_only" or "amid".
        term_weights: weights in place of the method's, by term, such as `{"conditional_entropy": 0.5}`; see
            `TermWeights`. 0 switches a term off.
        weight_warmup: share of the steps over which the weights of all terms but the task losses rise linearly.
        temperature: of the cosines in the information terms.
        memory_bank: past pairs that the information terms contrast with as well; 0: the batch alone.
        hinton_temperature: softens the predictions that Hinton's term compares.
        generator_anchor: weight, within the conditional entropy, of the generator's squared error; 0: the adversary
            alone, which is unstable.
        teacher_learns: whether the information terms train the teacher, too. Without that there is no short cut, and
            no teacher that adapts.
        classification_weight, retrieval_weight: of the two parts of each task loss.
        retrieval_temperature: of the cosines in the retrieval loss.
        label_smoothing: of the classification.

    > Networks

    Args:
        teacher_size: of the teacher's features.
        comparison_size: of the vectors that the information terms compare.
        embedding_size: of the embeddings for retrieval; None: the features.
        discriminator_size: of the discriminator's layers.
        discriminator_learning_rate: of its own Adam, constant.

    > Data

    Args:
        student_column: column of the student's modality.
        label_column: column of the classes.
        max_caption_length: tokens that texts are cut to; None for the tokenizer's limit.
        max_bad_fraction: training stops when more than this share of the rows cannot be used.

    > Diagnostics

    Args:
        teacher_drop: fall of the teacher's accuracy below its best, in [0, 1], that is warned of.
        discriminator_ceiling: accuracy of the discriminator above which it is said to saturate.
        save_run_folder: after training, write the student, `metrics.json`, a report and a card to `output_dir`.

    Raises:
        ValueError: a value is impossible; the message names the argument, the value and what is allowed.
    """

    method: str = setting("amid", f"Which terms train: {', '.join(METHODS)}.")
    term_weights: dict[str, Any] | str = setting({}, "Weights in place of the method's, by term; 0: off.")
    weight_warmup: float = setting(0.0, "Share of the steps over which the weights of distillation rise.")
    temperature: float = setting(0.1, "Of the cosines in the information terms.")
    memory_bank: int = setting(0, "Past pairs that are negatives as well; 0: none.")
    hinton_temperature: float = setting(4.0, "Softens the predictions of Hinton's term.")
    generator_anchor: float = setting(1.0, "Of the generator's squared error, beside the adversary.")
    teacher_learns: bool = setting(True, "Whether the information terms train the teacher, too.")
    classification_weight: float = setting(1.0, "Of the cross-entropy in each task loss.")
    retrieval_weight: float = setting(0.0, "Of the supervised contrastive loss in each task loss.")
    retrieval_temperature: float = setting(0.1, "Of the cosines in the retrieval loss.")
    label_smoothing: float = setting(0.0, "Of the classification.")
    teacher_size: int = setting(128, "Of the teacher's features.")
    comparison_size: int = setting(64, "Of the vectors that the information terms compare.")
    embedding_size: int | None = setting(None, "Of the embeddings for retrieval; none: the features.")
    discriminator_size: int = setting(128, "Of the discriminator's layers.")
    discriminator_learning_rate: float = setting(1e-3, "Of the discriminator's Adam.")
    student_column: str = setting("image", "Column of the student's modality.")
    label_column: str = setting("label", "Column of the classes.")
    max_caption_length: int | None = setting(None, "Tokens that texts are cut to.")
    max_bad_fraction: float = setting(0.01, "Share of unusable rows above which the run stops.")
    teacher_drop: float = setting(0.05, "Fall of the teacher's accuracy that is warned of.")
    discriminator_ceiling: float = setting(0.98, "Accuracy of the discriminator that is warned of.")
    save_run_folder: bool = setting(True, "Write student, metrics.json, report and card when training ends.")

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["term_weights"]

    def __post_init__(self):
        if is_one_of_several_without_accelerator():
            self.use_cpu = True  # else each process would train alone, and write over the others
        self.remove_unused_columns = False  # the columns are chosen by their modality
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # nothing to pin for, and torch warns of it each epoch
        for name, problem in distillation_problems({name: getattr(self, name) for name in OWN_FIELDS}):
            raise ValueError(f"{name}: {problem}.")

    @property
    def weights(self) -> TermWeights:
        """The weights of the terms: the method's, changed by `term_weights`."""
        return TermWeights(**{**vars(METHODS[self.method]), **self.term_weights})


OWN_FIELDS = {
    field.name: field.type
    for field in fields(AuxiliaryDistillationArguments)
    if field.name not in {inherited.name for inherited in fields(TrainingArguments)}
}


def distillation_problems(given: dict[str, Any]):
    """What is wrong with values of `OWN_FIELDS`, as pairs of a name and the problem in words."""
    for name, value in given.items():
        if name == "term_weights":
            yield from _weight_problems(value)
        elif problem := problem_with(
            value, OWN_FIELDS[name], tuple(METHODS) if name == "method" else (), RANGES.get(name, "")
        ):
            yield name, problem
    weights = (given.get("classification_weight", 1.0), given.get("retrieval_weight", 0.0))
    if weights == (0, 0):
        yield "classification_weight", "it and retrieval_weight are both 0, which leaves no task; raise one of them"


def _weight_problems(weights: Any):
    if not isinstance(weights, dict):
        yield "term_weights", f"{weights!r} is not allowed; allowed: a mapping of {', '.join(TERMS)} to weights"
        return
    for term, weight in weights.items():
        if problem := problem_with(term, str, TERMS):
            yield "term_weights", problem
        elif problem := problem_with(weight, float, within="[0, inf)"):
            yield f"term_weights.{term}", problem
