"""Criterion that predicts from features whether a student can gain from its teacher, and by which method."""

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from accelerate.utils import send_to_device

from hf_dissect.distillation.data_collator import DistillationCollator, compute_row_masks
from hf_dissect.distillation.information import (
    FEWEST_ROWS,
    bound_information,
    compute_entropy,
    estimate_cross_entropy,
    estimate_information,
)
from hf_dissect.distillation.networks import DistillationNetworks
from hf_dissect.distillation.training_data import ModalityRows

logger = logging.getLogger(__name__)

SMALLEST_GAIN = 0.05
"""Nats per training row below which the teacher's knowledge is not worth a distillation."""
MOST_ROWS, MOST_HELD_OUT_ROWS = 2000, 1000
"""Numbers of rows that are read, of the training rows and of those held out; half of them with labels if there are."""


@dataclass(frozen=True)
class Criterion:
    """Estimates of what student S, teacher T and auxiliaries A know, in nats, and what they predict.

    An estimate is None where there are too few rows for it. None of them is clipped.

    Attributes:
        held_out: Rows that the estimates were evaluated on, in words.
        rows: Number of training rows with auxiliaries that were read.
        held_out_rows: Number of held-out rows with auxiliaries that were read.
        labelled_rows: Number of `rows` with a label.
        labelled_held_out_rows: Number of `held_out_rows` with a label of which the other rows have one, too.
        unlabelled_share: Share of all training rows that have auxiliaries and no label.
        label_entropy: H(Y) of the labelled rows.
        cross_entropy_student: Cross-entropy of a head on the features of S, an estimate of H(Y|S).
        cross_entropy_teacher: Cross-entropy of a head on the features of T, an estimate of H(Y|T).
        cross_entropy_auxiliaries: Cross-entropy of a head on the features of S and A, an estimate of H(Y|S,A).
        information_bound: InfoNCE lower bound of I(T;S).
        information_cap: Largest number that the bound can reach, the logarithm of the number of held-out rows.
        information_uncapped: Estimate of I(T;S) without that cap, see `estimate_information`.
        seconds: Seconds that it took, for a pilot those of its training as well.
    """

    held_out: str
    rows: int
    held_out_rows: int
    labelled_rows: int
    labelled_held_out_rows: int
    unlabelled_share: float
    label_entropy: float | None = None
    cross_entropy_student: float | None = None
    cross_entropy_teacher: float | None = None
    cross_entropy_auxiliaries: float | None = None
    information_bound: float | None = None
    information_cap: float | None = None
    information_uncapped: float | None = None
    seconds: float = 0.0

    @property
    def student_label(self) -> float | None:
        """I(S;Y) = H(Y) - H(Y|S)."""
        return _subtract(self.label_entropy, self.cross_entropy_student)

    @property
    def teacher_label(self) -> float | None:
        """I(T;Y) = H(Y) - H(Y|T)."""
        return _subtract(self.label_entropy, self.cross_entropy_teacher)

    @property
    def auxiliaries_label(self) -> float | None:
        """I(A;Y|S) = H(Y|S) - H(Y|S,A), what the auxiliaries add."""
        return _subtract(self.cross_entropy_student, self.cross_entropy_auxiliaries)

    @property
    def gain(self) -> float | None:
        """Nats per training row that the teacher knows and the labels do not tell the student.

        It is the share of rows that have auxiliaries and no label, times what the better of T and (S, A) knows of the
        class beyond S; at least 0.
        """
        if self.unlabelled_share == 0:
            return 0.0
        better = [value for value in (self.cross_entropy_teacher, self.cross_entropy_auxiliaries) if value is not None]
        if self.cross_entropy_student is None or not better:
            return None
        return self.unlabelled_share * max(0.0, self.cross_entropy_student - min(better))

    @property
    def method(self) -> str:
        """Method that the criterion picks: student, hinton or amid.

        The last step is the criterion of arXiv 2510.13182 for the distillation of features: I(T;S) > I(S;Y).
        """
        if self.gain is None or self.gain < SMALLEST_GAIN:
            return "student"
        known = [value for value in (self.information_bound, self.information_uncapped) if value is not None]
        return "amid" if known and self.student_label is not None and max(known) > self.student_label else "hinton"

    @property
    def sentence(self) -> str:
        """Prediction in words."""
        if self.unlabelled_share == 0:
            return (
                "all training rows with auxiliaries have labels, which tell the student what the teacher knows: "
                "nothing to gain here: train the student alone"
            )
        if self.gain is None:
            return (
                f"not known whether distillation can gain ({self.labelled_rows} labelled rows and "
                f"{self.labelled_held_out_rows} held out; at least {FEWEST_ROWS} of each are needed): train the "
                "student alone, or compare the methods"
            )
        knows = f"the teacher knows {self.gain:.2g} nats that the labels do not tell the student"
        if self.method == "student":
            return f"{knows}: nothing to gain here: train the student alone"
        return f"{knows}: distillation can gain ({self.method})"

    def to_dict(self) -> dict[str, Any]:
        """Return estimates and predictions for `metrics.json`."""
        derived = ("student_label", "teacher_label", "auxiliaries_label", "gain", "method", "sentence")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Make a criterion of the content that `to_dict` returned."""
        return cls(**{field.name: saved[field.name] for field in dataclasses.fields(cls) if field.name in saved})


@dataclass(frozen=True)
class RowPart:
    """Some of the rows of a data set.

    Args:
        rows: Data set.
        places: Places of the rows in it.
    """

    rows: ModalityRows
    places: Sequence[int]


def hold_out(label_numbers: Sequence[int], groups: Sequence[Any] | None) -> tuple[list[int], list[int]]:
    """Divide training rows into those to fit by and a fifth to test by, the same for all runs.

    More than a fifth, up to half, is held out where a fifth has fewer labels than an estimate needs.

    Args:
        label_numbers: Class of each row, -1 where the label is missing.
        groups: Group of each row, which stays whole, such as its subject; None for rows at random. With one group
            alone, its rows are divided at random.

    Returns:
        Places of both parts, in ascending order.
    """
    count = len(label_numbers)
    kinds = range(count) if groups is None else np.asarray(groups, dtype=object).tolist()
    members: dict[Any, list[int]] = {}
    for place, kind in enumerate(kinds):
        members.setdefault(kind, []).append(place)
    if len(members) < 2:
        members = {place: [place] for place in range(count)}
    order = np.random.default_rng(0).permutation(len(members))
    parts = [members[name] for name in sorted(members, key=str)]
    held_out: set[int] = set()
    labelled = 0
    for part in (parts[place] for place in order[:-1]):
        if len(held_out) >= count / 5 and (labelled >= FEWEST_ROWS or len(held_out) + len(part) > count / 2):
            break
        held_out.update(part)
        labelled += sum(label_numbers[place] >= 0 for place in part)
    return [place for place in range(count) if place not in held_out], sorted(held_out)


def measure_criterion(
    networks: DistillationNetworks,
    collator: DistillationCollator,
    train: RowPart,
    held_out: RowPart,
    *,
    described: str,
    batch_size: int,
) -> Criterion:
    """Measure the criterion of networks; it changes neither them nor any random state.

    Args:
        networks: Networks with a teacher.
        collator: Collator of their rows.
        train: Rows that the estimators are fitted to.
        held_out: Rows that they are evaluated on.
        described: The held-out rows in words.
        batch_size: Number of rows in a forward pass.

    Raises:
        ValueError: The networks have no teacher, or there are no rows.
    """
    if not train.places or not held_out.places:
        raise ValueError("There are no rows to measure the criterion on; at least two training rows are needed.")
    if networks.teacher is None:
        raise ValueError("The networks have no teacher, of which the criterion could be measured; use another method.")
    start = time.perf_counter()
    own = _read_features(networks, collator, _draw(train, MOST_ROWS), batch_size)
    other = _read_features(networks, collator, _draw(held_out, MOST_HELD_OUT_ROWS), batch_size)
    labels = own.label[own.has_label]
    # No head can know a class of which no training row has a label.
    tested = other.has_label & torch.isin(other.label, labels)
    entropies = {}
    for name in ("student", "teacher", "auxiliaries"):
        parts = (getattr(own, name)[own.has_label], labels, getattr(other, name)[tested], other.label[tested])
        entropies[f"cross_entropy_{name}"] = _keep_finite(estimate_cross_entropy(*parts))
    features = (own.teacher, own.student, other.teacher, other.student)
    bound = bound_information(*features)
    return Criterion(
        held_out=described,
        rows=len(own.label),
        held_out_rows=len(other.label),
        labelled_rows=len(labels),
        labelled_held_out_rows=int(tested.sum()),
        unlabelled_share=_find_unlabelled_share(train.rows, own),
        label_entropy=compute_entropy(torch.cat([labels, other.label[tested]])),
        information_bound=None if bound is None else _keep_finite(bound.nats),
        information_cap=None if bound is None else bound.cap,
        information_uncapped=_keep_finite(estimate_information(*features)),
        seconds=time.perf_counter() - start,
        **entropies,
    )


@dataclass(frozen=True)
class _Features:
    """Features of the rows with auxiliaries, float32 `(n, D)`; `auxiliaries` are those of S and A."""

    student: torch.Tensor
    teacher: torch.Tensor
    auxiliaries: torch.Tensor
    label: torch.Tensor
    has_label: torch.Tensor
    unlabelled_read: int


def _draw(part: RowPart, most: int) -> RowPart:
    """Draw rows, half of them with labels if there are so many of both kinds; the same ones at each call."""
    random, numbers = np.random.default_rng(0), part.rows.label_numbers
    kinds = [[place for place in part.places if (numbers[place] >= 0) is known] for known in (True, False)]
    counts = [
        min(len(kind), max(most // 2, most - len(other))) for kind, other in zip(kinds, kinds[::-1], strict=True)
    ]
    drawn = [random.permutation(len(kind))[:count] for kind, count in zip(kinds, counts, strict=True)]
    return RowPart(
        part.rows, sorted(kind[place] for kind, places in zip(kinds, drawn, strict=True) for place in places)
    )


@torch.no_grad()
def _read_features(
    networks: DistillationNetworks, collator: DistillationCollator, part: RowPart, batch_size: int
) -> _Features:
    modes = {module: module.training for module in networks.modules()}
    device = next(networks.parameters()).device
    columns: dict[str, list[torch.Tensor]] = {}
    networks.eval()
    try:
        for start in range(0, len(part.places), batch_size):
            batch = collator([part.rows[place] for place in part.places[start : start + batch_size]])
            outputs = networks(send_to_device(batch["inputs"], device))
            has_label, has_auxiliaries = compute_row_masks(batch["row_state"])
            auxiliaries = [outputs["student_features"]]
            auxiliaries += [outputs[f"auxiliary.{name}_features"] for name in networks.auxiliaries]
            read = {"student": outputs["student_features"], "teacher": outputs["teacher_features"]}
            read["auxiliaries"] = torch.cat([values.flatten(1).float() for values in auxiliaries], 1)
            read |= {"label": batch["label"], "has_label": has_label, "counted": has_auxiliaries}
            for name, values in read.items():
                columns.setdefault(name, []).append(
                    values.float().cpu() if values.is_floating_point() else values.cpu()
                )
    finally:
        for module, mode in modes.items():
            module.training = mode
    joined = {name: torch.cat(values) for name, values in columns.items()}
    finite = torch.stack([joined[name].isfinite().all(-1) for name in ("student", "teacher", "auxiliaries")]).all(0)
    counted = joined.pop("counted")
    if bool((counted & ~finite).any()):
        logger.warning("Features of %d rows are not finite; the criterion leaves them out.", (counted & ~finite).sum())
    unlabelled = sum(part.rows.label_numbers[place] < 0 for place in part.places)
    kept = {name: values[counted & finite] for name, values in joined.items()}
    return _Features(**kept, unlabelled_read=unlabelled)


def _find_unlabelled_share(rows: ModalityRows, read: _Features) -> float:
    """Return the share of all rows that have auxiliaries and no label; the auxiliaries are known of those read."""
    if read.unlabelled_read == 0:
        return 0.0
    unlabelled = sum(number < 0 for number in rows.label_numbers) / len(rows)
    return unlabelled * float((~read.has_label).sum()) / read.unlabelled_read


def _keep_finite(estimate: float | None) -> float | None:
    """Return an estimate; None, which means "not known", if its fit diverged."""
    return estimate if estimate is not None and math.isfinite(estimate) else None


def _subtract(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second
