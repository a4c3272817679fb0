"""Figures must get titles and digits that a reader understands without the source."""

import math

import pytest

from hf_dissect.report.tables import format_number, label


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("retrieval_r@1_image_to_text", "Image→text R@1"),
        ("eval_text_to_image_R@10", "Text→image R@10"),
        ("retrieval_recall_sum", "Recall sum"),
        ("noise_kept", "Mismatched among kept"),
    ],
)
def test_metric_titles(key, title):
    assert label(key) == title


def test_numbers():
    assert format_number(0.1234, "kept_share") == "12.3 %"
    assert format_number(90, "total_s") == "90.0 s" and format_number(5400, "total_s") == "90.0 min"
    assert format_number(10800, "total_s") == "3.00 h" and format_number(30000, "num_pairs") == "30,000"
    assert format_number(0.5, "r@1") == "0.500" and format_number(None) == format_number(math.nan) == "–"
