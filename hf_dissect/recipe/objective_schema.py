"""The section of a recipe about the loss, and those of the objectives that may replace the contrastive one."""

import dataclasses

from hf_dissect.settings import setting


@dataclasses.dataclass
class GscSection:
    """Soft labels for pairs that may be mismatched (GSC, CVPR 2024), and the loss that they weight."""

    gamma: float = setting(0.01, "Weight of the loss within the modalities.", within="[0, inf)")
    beta: float = setting(0.7, "Share of the new evidence in a label, at each epoch.", within="(0, 1]")
    temperature: float = setting(
        0.07, "Temperature of the softmax over the cosines, in place of the model's.", within="(0, inf)"
    )
    warmup_epochs: int = setting(1, "Epochs that train by the contrastive loss first.", within="[0, inf)")
    dual: bool = setting(False, "Train two networks, each with the other's labels (GSC+); costs twice as much.")


@dataclasses.dataclass
class ObjectiveSection:
    """The loss."""

    grad_cache_chunk_size: int | None = setting(
        None,
        "Pairs that go through the model at a time with gradient, the loss being that of the whole batch (GradCache, "
        "arXiv 2101.06983), at the price of a second forward pass; null: all at once.",
        within="[1, inf)",
        argument="grad_cache_chunk_size",
    )
    gsc: GscSection | None = setting(
        None,
        "Train with the soft labels of GSC (arXiv 2405.16996) after a warm-up: its settings, such as "
        '{"gamma": 0.01, "warmup_epochs": 2}, or {} for the defaults; null: the contrastive loss throughout.',
        argument="gsc",
    )
