"""The `evaluate` module of `hf_dissect.evaluation.noise_detection_metrics`, which collects examples batch by batch."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_dissect.evaluation.modules import check_columns
from hf_dissect.evaluation.noise_recognition import noise_detection_metrics

_DESCRIPTION = """\
Separation of matched from mismatched image-text pairs by a score, for data with known truth: area under the ROC curve,
average precision of finding the mismatched pairs, share of them recognised, and share of clean pairs among the
highest-scored. Pairs without a score are left out and counted.
"""

_KWARGS_DESCRIPTION = """
Args:
    scores: score of each pair, higher for a more likely clean one, NaN where it was never scored; (num_pairs,).
    is_clean: True where the caption truly belongs to the image; (num_pairs,).
    shares: the highest-scored shares of the pairs to look into, (0.3, 0.5).
Returns:
    auroc: probability that a clean pair scores above a mismatched one, a tie counting half.
    average_precision: of finding the mismatched pairs among the lowest-scored.
    recognised: share of mismatched pairs among the n lowest-scored, n being the number of mismatched pairs.
    clean_share@30, clean_share@50: share of clean pairs among the 30 % and 50 % highest-scored.
    num_scored, num_mismatched, num_unscored: counts of pairs.
    All but the counts are None where only one kind of pair was scored.
Examples:
    >>> from hf_dissect.evaluation import load
    >>> noise_detection = load("noise_detection")
    >>> results = noise_detection.compute(scores=[0.9, 0.8, 0.3, 0.1], is_clean=[True, True, False, False])
    >>> print(results["auroc"], results["recognised"])
    1.0 1.0
"""

_CITATION = """\
@inproceedings{zhao2025differential,
  title     = {Differential-informed Sample Selection Accelerates Multimodal Contrastive Learning},
  author    = {Zhao, Zihua and Hong, Feng and Chen, Mengxi and Chen, Pengyi and Liu, Benyuan and Yao, Jiangchao and
               Zhang, Ya and Wang, Yanfeng},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2025}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class NoiseDetection(evaluate.Metric):
    """The metric `noise_detection` of `evaluate`; `add_start_docstrings` adds its description."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"scores": datasets.Value("float64"), "is_clean": datasets.Value("bool")}),
            reference_urls=["https://arxiv.org/abs/2507.12998"],
        )

    def add_batch(self, **columns: Any) -> None:
        """Add a batch of pairs.

        Args:
            **columns: Values of each column, one row per example.

        Raises:
            ValueError: If a column is missing, or the columns differ in length.
        """
        check_columns(columns, self._feature_names())
        super().add_batch(**columns)

    def _compute(
        self, scores: Sequence[float], is_clean: Sequence[bool], shares: Sequence[float] = (0.3, 0.5)
    ) -> dict[str, float | int | None]:
        # Arrow may return NaN as None; numpy reads either as NaN.
        return noise_detection_metrics(np.asarray(scores, np.float64), is_clean, shares)
