"""A training step of a tiny model, with the gradient cache and without, for tests in one process and in several."""

from functools import partial

import torch
from torch import nn

from hf_dissect.data.model_inputs import forward_inputs
from hf_dissect.losses import ContrastiveLoss, grad_cached_backward
from hf_dissect.models.loading import find_loss_kind, find_text_padding, logit_scale_and_bias
from hf_dissect.models.tasks import Decorrelation, select_representations
from testing import tiny_models

PAIRS = 10
ADAPTERS = {
    "lora": tiny_models.with_lora,
    "router": partial(tiny_models.with_mola, router_input="embeddings", init_weights=False, decorrelation_weight=2.0),
    "grad": partial(tiny_models.with_mola, variant="grad", init_weights=False, train_logit_scale=True),
}


def model_and_batch(family: str, adapter: str | None = None, dtype=torch.float64) -> tuple[nn.Module, dict]:
    """A model in evaluation mode, and a batch as the collator and the selection make it."""
    model, processor = getattr(tiny_models, family)()
    padding = find_text_padding(model)
    model = ADAPTERS[adapter](model) if adapter else model
    if family == "tiny_clip":
        with torch.no_grad():  # where the model is born, its gradients are too small to compare
            model.get_base_model().logit_scale.fill_(1.0) if adapter else model.logit_scale.fill_(1.0)
    pictures = [tiny_models.tiny_picture(3 * index)[0] for index in range(PAIRS)]
    captions = tiny_models.CAPTIONS[: 3 * PAIRS : 3]
    batch = {
        **processor.image_processor(images=pictures, return_tensors="pt"),
        **processor.tokenizer(captions, padding=padding, truncation=True, return_tensors="pt"),
        "image_key": torch.tensor([0, 1, 2, 3, 0, 5, 6, 1, 8, 9]),
        "caption_key": torch.arange(100, 100 + PAIRS),
        "pair_weight": torch.linspace(0.5, 2, PAIRS, dtype=dtype),
        "task_id": torch.arange(PAIRS) % 2,
    }
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    return model.to(dtype), batch


def loss_of_batch(model, batch, outputs, scale, bias, plain=False) -> torch.Tensor:
    """What the trainer computes, all of it: masked, weighted, and decorrelated where there is a router."""
    loss = ContrastiveLoss(find_loss_kind(model), mask_false_negatives=True)(
        outputs,
        scale=scale,
        bias=bias,
        weights=batch["pair_weight"],
        image_key=batch["image_key"],
        caption_key=batch["caption_key"],
    )
    return Decorrelation().add_to(loss, model, batch, None if plain else outputs["projections"])


def plain_step(model, batch, backward=torch.Tensor.backward) -> torch.Tensor:
    outputs = model(**forward_inputs(model, batch))
    loss = loss_of_batch(model, batch, outputs, *logit_scale_and_bias(model), plain=True)
    backward(loss)
    return loss.detach()


def cached_step(model, batch, chunk_size, **settings) -> torch.Tensor:
    return grad_cached_backward(
        model,
        forward_inputs(model, batch),
        partial(loss_of_batch, model, batch),
        chunk_size=chunk_size,
        representations=partial(select_representations, model),
        **settings,
    )


def pop_gradients(model) -> dict[str, torch.Tensor]:
    """The gradients of all parameters that have one, taken off the model."""
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return {name.removeprefix("module."): gradient for name, gradient in gradients.items()}


def assert_same_gradients(found: dict, expected: dict, rtol: float, floor: float = 1e-3) -> None:
    """To `rtol` of each parameter's largest gradient, or of `floor` times the model's where that is larger."""
    assert expected and set(found) == set(expected)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 1e-4
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max()
        assert error <= rtol * max(gradient.abs().max(), floor * largest), (name, error, gradient.abs().max())
