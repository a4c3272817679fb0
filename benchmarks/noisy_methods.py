"""What `noisy_correspondence.py` compares: the conditions (kind and share of wrong captions) and the methods.

A method is one line of METHODS: its name and the settings that make it. A condition is a kind and a percentage, such
as random40. Some are fixed files next to the data; the others are made by the package, with a fixed seed.
"""

import re
from pathlib import Path

import numpy as np
import torch

from hf_dissect.selection import CandidateScores, SampleLedger, Selection
from hf_dissect.selection.uniform import KeepAll

SETTINGS = [
    "selection.mask_false_negatives=false",  # GSC's loss knows no mask
    "model.max_caption_length=16",
    "model.config.text_config.hidden_size=64",
    "model.config.text_config.intermediate_size=128",
    "model.config.text_config.num_attention_heads=2",
    "training.num_train_epochs=8",
    "training.learning_rate=3e-3",
    "training.eval_strategy=epoch",
    "training.report_to=none",
    "training.disable_tqdm=true",
    "training.logging_steps=58",
]
ALL_PAIRS = ["selection.strategy=none"]
GSC = [*ALL_PAIRS, "objective.gsc.warmup_epochs=1"]
NCR_DIVISION = ["selection.strategy=ncr", "selection.warmup_epochs=1", "selection.ratio=1", "objective.division={}"]
CHANNEL = [*ALL_PAIRS, "objective.noisy_channel={}"]
SMOOTHED = [*ALL_PAIRS, "objective.noisy_channel.smoothing=0.1"]
METHODS = {
    "none": ALL_PAIRS,
    "random": ["selection.strategy=random"],
    "small_loss": ["selection.strategy=small_loss"],
    "big_loss": ["selection.strategy=big_loss"],
    "clipscore": ["selection.strategy=clipscore"],
    "ncr": ["selection.strategy=ncr", "selection.warmup_epochs=1"],
    "ncr-division": NCR_DIVISION,  # all pairs, weighted by what the rule divides them by
    "dissect": ["selection.strategy=dissect", "selection.warmup_epochs=4"],
    "dissect:momentum": ["selection.strategy=dissect", "selection.options.variant=momentum"],
    "gsc-rule": ["selection.strategy=gsc"],  # keeps the largest labels instead of weighting by them
    "gsc": GSC,
    "gsc-posterior": [*GSC, "objective.gsc.evidence=posterior"],
    "gsc-without-labels": [*GSC, "objective.gsc.beta=1e-9"],  # its loss and temperature alone
    "gsc+": [*GSC, "objective.gsc.dual=true"],
    "gsc+-without-labels": [*GSC, "objective.gsc.dual=true", "objective.gsc.beta=1e-9"],  # what two networks gain
    "info_batch": ["selection.strategy=info_batch"],
    "scan": ["selection.strategy=scan", "selection.warmup_epochs=1"],
    "divbs": ["selection.strategy=divbs"],
    "forgetting": ["selection.strategy=forgetting"],
    "forgetting-never-learnt-last": ["selection.strategy=forgetting", "selection.options.never_learnt=last"],
    "rince": [*ALL_PAIRS, "objective.rince={}"],
    "symnce": [*ALL_PAIRS, "objective.symnce={}"],
    "noisy_channel": CHANNEL,
    "noisy_channel-smoothed": SMOOTHED,
    "repair": [*CHANNEL, "objective.repair={}"],
    "repair-both": [*CHANNEL, "objective.repair.side=both"],
    "repair-learnt": [*CHANNEL, "objective.repair.space=learnt"],
    "repair-average": [*CHANNEL, "objective.repair.space=average"],
    "repair-mismatched": [*CHANNEL, "objective.repair.all_pairs=false"],
    "repair-mismatched-smoothed": [*SMOOTHED, "objective.repair.all_pairs=false"],
    "gsc-repair": [*GSC, "objective.repair={}"],
    "gsc-posterior-repair": [*GSC, "objective.gsc.evidence=posterior", "objective.repair={}"],
    "ncr-division-repair": [*NCR_DIVISION, "objective.repair={}"],
    "noisy_channel-half": ["selection.strategy=noisy_channel"],
    "repair-half": ["selection.strategy=noisy_channel", "objective.repair={}"],
    "noisy_channel-half-m8": ["selection.strategy=noisy_channel", "selection.rescore_every=8"],
    "learnability": ["selection.strategy=learnability"],
    "rho": ["selection.strategy=rho"],
    "jest": ["selection.strategy=jest"],
    "coreset": ["selection.strategy=coreset"],
    "oracle": ALL_PAIRS,  # knows the truth: mismatched pairs have no weight
}
OPINIONS = ("label_auroc", "p_clean_auroc", "evidence_auroc", "ranking_auroc", "model_auroc")  # the first counts
BY_REFERENCE = ("learnability", "rho", "jest", "coreset")  # only with --reference
IN_README_CONDITIONS = ("random0", "random20", "random40", "random60", "neighbours20", "neighbours40", "neighbours60")
IN_README = ("none", "small_loss", "ncr", "dissect", "gsc", "gsc+", "noisy_channel", "repair", "oracle")

CONDITIONS = ("random0", "random20", "random40", "random60", "random80")
CONDITIONS += ("neighbours20", "neighbours40", "neighbours60", "partial40", "absent40", "absent60")
KINDS = {
    "random": "captions exchanged at random",
    "neighbours": "captions exchanged between near neighbours",
    "partial": "one noun of the caption replaced",
    "absent": "captions of images that are not in the data",
}
_FILES = {f"random{rate}": f"caption_order_noise{rate}.npy" for rate in (20, 40, 60)}
_FILES |= {"neighbours40": "caption_order_neighbours40.npy"}


def order_file(condition: str) -> str | None:
    """The file next to the data with the order of the captions; None for a condition that the package makes."""
    return _FILES.get(condition)


def split_condition(name: str) -> tuple[str, int]:
    """The kind and the percentage of a condition."""
    kind, rate = re.fullmatch(r"([a-z]+)(\d+)", name).groups()
    return kind, int(rate)


def read_condition(text: str) -> str:
    """The name of a condition; a number alone is the percentage of captions that are exchanged at random."""
    name = f"random{text}" if text.isdigit() else text
    if name not in CONDITIONS:
        raise ValueError(f"{text}: choose of {', '.join(CONDITIONS)}")
    return name


def noise_settings(condition: str, num_pairs: int, folder: str) -> list[str]:
    """The settings that make a condition; at 0 %, an order that moves nothing, so that the truth is known."""
    kind, rate = split_condition(condition)
    if file := _FILES.get(condition):
        return [f"data.noise_permutation={file}"]
    if rate == 0:
        order = Path(folder, "unmoved.npy")
        np.save(order, np.arange(num_pairs))
        return [f"data.noise_permutation={order}"]
    return ["data.noise_permutation=null", f"data.noise_kind={kind}", f"data.noise_rate={rate / 100}"]


class Oracle(KeepAll):
    """Weights the pairs by the truth, a bool `(pairs,)` in the order of the sample ids."""

    name = "oracle"

    def __init__(self, is_clean: torch.Tensor):
        super().__init__()
        self._weights = is_clean.float()

    def select(self, scores: CandidateScores, ledger: SampleLedger, k: int) -> Selection:
        return Selection(torch.arange(scores.num_candidates), weights=self._weights[scores.sample_id])
