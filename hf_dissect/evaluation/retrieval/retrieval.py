"""The `evaluate` module of `hf_dissect.evaluation.retrieval_from_pairs`, which collects examples batch by batch."""

import itertools
from typing import Any

import datasets
import evaluate

from hf_dissect.evaluation.modules import check_columns
from hf_dissect.evaluation.recall import retrieval_from_pairs

_DESCRIPTION = """\
Cross-modal retrieval by cosine: the share of the images that find one of their own captions among the first 1, 5 and
10, and the share of the captions that find their image; the median ranks; and the sum of the six recalls. Images with
several captions follow the usual protocol of Flickr and MS-COCO: the best-ranked own caption counts. With text_ids, a
caption that several images share is right for all of them. Ranks are exact, ties count against the model, and memory
does not grow with the number of similarities.
"""

_KWARGS_DESCRIPTION = """
Args:
    image_embeds: embedding of the image of each (image, caption) pair, (num_pairs, dim), any scale.
    text_embeds: embedding of its caption, (num_pairs, dim), any scale.
    image_ids: integer or string of each pair, equal where pairs share an image; (num_pairs,). An image is kept once.
    text_ids: integer or string of each pair, equal where pairs have the same caption, such as the captions themselves;
        (num_pairs,). Without it, no two captions count as equal.
    block_size: similarities are computed in blocks of block_size x block_size (1024).
Returns:
    image_to_text_R@1, image_to_text_R@5, image_to_text_R@10: in per cent.
    text_to_image_R@1, text_to_image_R@5, text_to_image_R@10: in per cent.
    image_to_text_median_rank, text_to_image_median_rank: counted from 1.
    recall_sum: sum of the six recalls, at most 600.
    repeated_captions: with text_ids, number of captions that several images share, left out if there are none; and
        image_to_text_own_ceiling@1, @5, @10 and text_to_image_own_ceiling@1, @5, @10: the best recall in per cent
        where only a pair's own caption or image counts as right.
Examples:
    >>> from hf_dissect.evaluation import load
    >>> retrieval = load("retrieval")
    >>> results = retrieval.compute(
    ...     image_embeds=[[1.0, 0.0], [0.0, 1.0]], text_embeds=[[0.9, 0.1], [0.2, 0.8]], image_ids=[0, 1])
    >>> print(results["image_to_text_R@1"])
    100.0
"""

_CITATION = """\
@inproceedings{karpathy2015deep,
  title     = {Deep Visual-Semantic Alignments for Generating Image Descriptions},
  author    = {Karpathy, Andrej and Fei-Fei, Li},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2015}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Retrieval(evaluate.Metric):
    """The metric `retrieval` of `evaluate`; `add_start_docstrings` adds its description."""

    def _info(self) -> evaluate.MetricInfo:
        embeds = {
            "image_embeds": datasets.List(datasets.Value("float32")),
            "text_embeds": datasets.List(datasets.Value("float32")),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # Absent text ids, which are None, fit the first of both kinds.
            features=[
                datasets.Features({**embeds, "image_ids": datasets.Value(ids), "text_ids": datasets.Value(keys)})
                for ids, keys in itertools.product(("string", "int64"), ("int64", "string"))
            ],
            reference_urls=["https://arxiv.org/abs/1412.2306"],
        )

    def add_batch(self, **columns: Any) -> None:
        """Add a batch of pairs.

        Args:
            **columns: Values of each column, one row per example.

        Raises:
            ValueError: If a column is missing, or the columns differ in length.
        """
        required = [name for name in self._feature_names() if name != "text_ids" or columns.get(name) is not None]
        check_columns(columns, required)
        if columns.get("text_ids") is None:
            columns["text_ids"] = [None] * len(columns["image_ids"])
        super().add_batch(**columns)

    def compute(self, **columns: Any) -> dict[str, float] | None:
        """Compute the metrics of the pairs that were added, and of those given here; None on other processes."""
        if "image_embeds" in columns:
            columns.setdefault("text_ids", None)
        return super().compute(**columns)

    def _compute(
        self,
        image_embeds: list[list[float]],
        text_embeds: list[list[float]],
        image_ids: list[int] | list[str],
        text_ids: list[int | None] | list[str | None],
        block_size: int = 1024,
    ) -> dict[str, float]:
        absent = sum(key is None for key in text_ids)
        if 0 < absent < len(text_ids):
            raise ValueError(
                f"text_ids are missing for {absent} of {len(text_ids)} pairs; give them for all pairs or for none."
            )
        text_key = None if absent else text_ids
        return retrieval_from_pairs(image_embeds, text_embeds, image_ids, text_key, block_size=block_size)
