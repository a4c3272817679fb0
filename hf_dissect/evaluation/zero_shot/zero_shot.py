"""The `evaluate` module of `hf_dissect.evaluation.zero_shot_metrics`, which collects examples batch by batch."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hf_dissect.evaluation.accuracy import zero_shot_metrics
from hf_dissect.evaluation.modules import check_columns

_DESCRIPTION = """\
Zero-shot classification: the share of the images whose class is the nearest, by cosine, of the class embeddings, and
the share whose class is among the five nearest. A class embedding comes from the name of the class put into prompt
templates (hf_dissect.evaluation.class_embeddings). Ties count against the model.
"""

_KWARGS_DESCRIPTION = """
Args:
    image_embeds: embedding of each image, (num_images, dim), any scale.
    labels: class of each image, (num_images,) integers, rows of class_embeds.
    class_embeds: (num_classes, dim), given to compute once, any scale.
    top_k: the k of accuracy@k, (1, 5); a k above num_classes is left out.
Returns:
    accuracy@1, accuracy@5: share of the images, from 0 to 1, whose class is among the k nearest.
    mean_per_class_accuracy: accuracy@1 of each class that occurs, averaged over the classes.
Examples:
    >>> from hf_dissect.evaluation import load
    >>> zero_shot = load("zero_shot")
    >>> results = zero_shot.compute(
    ...     image_embeds=[[0.9, 0.1], [0.6, 0.4]], labels=[0, 1], class_embeds=[[1.0, 0.0], [0.0, 1.0]])
    >>> print(results["accuracy@1"])
    0.5
"""

_CITATION = """\
@inproceedings{radford2021learning,
  title     = {Learning Transferable Visual Models From Natural Language Supervision},
  author    = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and Agarwal,
               Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and Krueger,
               Gretchen and Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2021}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ZeroShot(evaluate.Metric):
    """The metric `zero_shot` of `evaluate`; `add_start_docstrings` adds its description."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"image_embeds": datasets.List(datasets.Value("float32")), "labels": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/2103.00020"],
        )

    def add_batch(self, **columns: Any) -> None:
        """Add a batch of images.

        Args:
            **columns: Values of each column, one row per example.

        Raises:
            ValueError: If a column is missing, or the columns differ in length.
        """
        check_columns(columns, self._feature_names())
        super().add_batch(**columns)

    def _compute(
        self,
        image_embeds: list[list[float]],
        labels: list[int],
        class_embeds: list[list[float]],
        top_k: Sequence[int] = (1, 5),
    ) -> dict[str, float]:
        return zero_shot_metrics(image_embeds, class_embeds, labels, top_k)
