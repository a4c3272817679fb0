import math

import pytest
import torch
import torch.nn.functional as F
from testing.made_tensors import MadeTensors

from hf_dissect.losses import ContrastiveLoss, per_pair_loss
from hf_dissect.losses.contrastive import find_false_negatives


def outputs(size: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(size, 5, generator=generator, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(size, 5, generator=generator, dtype=torch.float64), dim=-1)
    logits = (text @ image.T * 7).requires_grad_()
    return {"image_embeds": image, "text_embeds": text, "logits_per_text": logits}


def value_of(loss: torch.Tensor) -> float:
    return loss.detach().item()


def written_out_softmax(logits: list[list[float]], excluded: set[tuple[int, int]] = frozenset()) -> list[float]:
    size, losses = len(logits), []
    for i in range(size):
        row = sum(math.exp(logits[i][j]) for j in range(size) if (i, j) not in excluded)
        column = sum(math.exp(logits[j][i]) for j in range(size) if (i, j) not in excluded)
        losses.append((math.log(row) + math.log(column)) / 2 - logits[i][i])
    return losses


def written_out_sigmoid(logits: list[list[float]], excluded: set[tuple[int, int]] = frozenset()) -> list[float]:
    size, losses = len(logits), []
    for i in range(size):
        terms = [math.log1p(math.exp(-(1 if i == j else -1) * logits[i][j])) for j in range(size)]
        losses.append(sum(term for j, term in enumerate(terms) if (i, j) not in excluded))
    return losses


WRITTEN_OUT = {"softmax": written_out_softmax, "sigmoid": written_out_sigmoid}


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_loss_per_pair_and_mean(kind):
    out = outputs()
    expected = WRITTEN_OUT[kind](out["logits_per_text"].tolist())
    assert per_pair_loss(out["logits_per_text"], kind=kind).tolist() == pytest.approx(expected, rel=1e-12)
    assert value_of(ContrastiveLoss(kind)(out)) == pytest.approx(sum(expected) / 6, rel=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_weights_scale_the_pairs(kind):
    out, weights = outputs(), torch.tensor([2.0, 0.0, 1.0, 1.0, 0.5, 3.0])
    expected = WRITTEN_OUT[kind](out["logits_per_text"].tolist())
    weighted = sum(w * loss for w, loss in zip(weights.tolist(), expected, strict=True)) / 6
    assert value_of(ContrastiveLoss(kind)(out, weights=weights)) == pytest.approx(weighted, rel=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_pairs_with_a_shared_image_or_caption_are_no_negatives(kind):
    out = outputs()
    image_key, caption_key = torch.tensor([1, 1, 2, 3, 4, 5]), torch.tensor([9, 8, 7, 6, 7, 5])
    excluded = {(0, 1), (1, 0), (2, 4), (4, 2)}
    expected = WRITTEN_OUT[kind](out["logits_per_text"].tolist(), excluded)
    loss = ContrastiveLoss(kind, mask_false_negatives=True)(out, image_key=image_key, caption_key=caption_key)
    assert value_of(loss) == pytest.approx(sum(expected) / 6, rel=1e-12)
    loss.backward()
    assert float(out["logits_per_text"].grad[0, 1]) == float(out["logits_per_text"].grad[4, 2]) == 0
    assert out["logits_per_text"].grad.isfinite().all()


def test_false_negatives_are_found_in_both_keys():
    keys = torch.tensor([[1, 1, 2], [5, 6, 6]])
    assert find_false_negatives(keys, keys).tolist() == [[True, True, False], [True, True, True], [False, True, True]]


def test_all_pairs_alike_leave_no_negative_and_no_nan():
    out = outputs(3)
    same = torch.zeros(3, dtype=torch.int64)
    loss = ContrastiveLoss("softmax", mask_false_negatives=True)(out, image_key=same, caption_key=same)
    loss.backward()
    assert value_of(loss) == 0 and out["logits_per_text"].grad.abs().sum() == 0


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("max_logits", [2**24, 16, 1])
def test_without_logits_they_are_made_of_the_embeddings(kind, max_logits):
    expected, keys = outputs(), torch.tensor([1, 1, 2, 3, 4, 5])
    settings = dict(weights=torch.tensor([2.0, 0.0, 1.0, 1.0, 0.5, 3.0]), image_key=keys, caption_key=keys)
    whole = ContrastiveLoss(kind, True)(expected, **settings)
    whole.backward()
    text, image = expected["text_embeds"].requires_grad_(), expected["image_embeds"].requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    embeds = {"image_embeds": image, "text_embeds": text}
    found = ContrastiveLoss(kind, True, max_logits)(embeds, scale=scale, **settings)
    (found * 3).backward()
    assert value_of(found) == pytest.approx(value_of(whole), rel=1e-12)
    gradient = expected["logits_per_text"].grad * 3
    assert torch.allclose(text.grad, gradient @ image * 7, rtol=1e-10)
    assert torch.allclose(image.grad, gradient.T @ text * 7, rtol=1e-10)
    assert scale.grad.item() == pytest.approx((gradient * (text @ image.T)).sum().item(), rel=1e-10)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_logits_are_bounded_in_both_passes_and_not_kept(kind):
    embeds = F.normalize(torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    out = {"image_embeds": embeds[0].clone().requires_grad_(), "text_embeds": embeds[1].clone().requires_grad_()}
    for max_logits in (64 * 64, 10 * 64):
        with MadeTensors() as made:
            loss = ContrastiveLoss(kind, max_logits=max_logits)(out, scale=torch.tensor(9.0))
            kept = made.alive()
            loss.backward()
        assert made.largest == max_logits
    assert kept < 5 * 64 * 4  # little more than the embeddings of both sides and their gradients


def test_low_precision_embeddings_make_single_precision_logits_even_under_autocast():
    out = {name: value.bfloat16() for name, value in outputs().items() if name != "logits_per_text"}
    scale = torch.tensor(7.0)
    exact = {name: value.float() for name, value in out.items()}
    for kind in ("softmax", "sigmoid"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = ContrastiveLoss(kind)(out, scale=scale)
        assert loss.dtype == torch.float32 and loss == ContrastiveLoss(kind)(exact, scale=scale)


def test_a_missing_scale_is_named():
    out = outputs()
    del out["logits_per_text"]
    with pytest.raises(ValueError, match="scale is missing"):
        ContrastiveLoss()(out)


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind='cosine'.*softmax, sigmoid"):
        ContrastiveLoss("cosine")
