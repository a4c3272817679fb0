"""Keys of a pair before it is collated, and of its columns in a batch."""

from hf_dissect.data.problems import PROBLEM_KEY

WEIGHT_KEY = "weight"
"""Key of a pair's weight before it is collated."""

GIVEN_WEIGHT = "given_weight"
"""Key of a batch with the weights that the data give, float32 `(B,)`."""

PAIR_KEYS = ("sample_id", "image_key", "caption_key", "bad_reason", PROBLEM_KEY, "task_id", "is_clean", GIVEN_WEIGHT)
"""Keys of a batch that describe the pairs and are not arguments of the model."""

ROW_KEYS = ("image", "caption", "sample_id")
"""Keys that every pair has before it is collated."""

OPTIONAL_ROW_KEYS = ("key", "task_id", "is_clean", "text_features", WEIGHT_KEY)
"""Keys that a pair may have before it is collated."""
