"""One router for all layers: softmax weights from the model's input, each tower from its own."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from testing.tiny_bases import adapted, pictures, tiny_bert, tiny_bert_classifier, tiny_resnet, tiny_vit, tokens
from testing.tiny_models import CAPTIONS, tiny_clip, tiny_dual_encoder, tiny_inputs, tiny_siglip
from torch import nn
from transformers import ResNetConfig, ResNetModel

from hf_dissect.mola import (
    EmbeddingRouter,
    MolaConfig,
    MolaLayer,
    PixelRouter,
    Router,
    mola_routing,
    register_router,
)


def routers(model):
    return [module for module in model.modules() if isinstance(module, Router)]


def clip(new=tiny_clip, **fields):
    base, processor = new()
    inputs = tiny_inputs(base, processor, CAPTIONS[:4])
    return adapted(base, **fields), inputs


def texts(inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in inputs}


def captured(model):
    """The weights that each layer is given in the passes to come."""
    found = {}
    routing = mola_routing(model)
    ask = routing.expert_weights

    def expert_weights(adapter_name, tower, *args, **options):
        found.setdefault(tower, []).append(ask(adapter_name, tower, *args, **options))
        return found[tower][-1]

    routing.expert_weights = expert_weights
    return found


# ---- the weights ----


@pytest.mark.parametrize("router_input", ["pixels", "embeddings"])
@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_one_router_gives_all_layers_the_same_softmax_weights(make, router_input):
    model = adapted(make(), router_input=router_input)
    assert len(routers(model)) == 1
    given = captured(model)
    model(**pictures())
    assert set(given) == {"model"} and len(given["model"]) == sum(isinstance(m, MolaLayer) for m in model.modules())
    for weights in given["model"]:
        assert weights is given["model"][0]
    weights = model.routing_weights()["model"]
    assert weights.shape == (4, 3) and not weights.requires_grad
    assert torch.allclose(weights.sum(1), torch.ones(4)) and (weights > 0).all(), "dense: every expert has a share"
    assert (weights[0] - weights[1]).abs().max() > 1e-5


def test_the_weights_are_the_softmax_of_the_resnet_on_the_reduced_image():
    model = adapted(tiny_resnet().double(), router_image_size=8)
    batch = pictures(dtype=torch.float64)
    model(**batch)
    router = routers(model)[0].branches["model"]
    assert isinstance(router, PixelRouter)
    reduced = batch["pixel_values"].reshape(4, 3, 8, 2, 8, 2).mean((3, 5))
    scores = router.scores(router.blocks(router.stem(reduced)).mean((2, 3)))
    expected = scores.exp() / scores.exp().sum(1, keepdim=True)
    assert (model.routing_weights()["model"] - expected).abs().max() < 1e-10


def test_the_embedding_router_sees_the_mean_of_the_real_tokens():
    base = tiny_bert().double()
    model = adapted(base)
    batch = tokens()
    model(**batch)
    table, router = base.embeddings.word_embeddings.weight, routers(model)[0].branches["model"]
    assert isinstance(router, EmbeddingRouter)
    rows = []
    for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        real = [table[token] for token, kept in zip(ids, mask, strict=True) if kept]
        rows.append(sum(real) / len(real))
    expected = router(torch.stack(rows)).softmax(1)
    assert (model.routing_weights()["model"] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("make", [tiny_bert, tiny_bert_classifier])
def test_padding_a_caption_does_not_change_its_routing(make):
    model = adapted(make(), router_input="embeddings")
    batch = tokens()
    model(**batch)
    weights = model.routing_weights()["model"]
    padded = {name: F.pad(value, (0, 5)) for name, value in batch.items()}
    padded["input_ids"][:, 6:] = 9  # whatever stands there
    model(**padded)
    assert torch.allclose(model.routing_weights()["model"], weights, atol=1e-6)
    padded["attention_mask"][:] = 1
    model(**padded)
    assert (model.routing_weights()["model"] - weights).abs().max() > 1e-4


def test_input_embeddings_in_place_of_ids_are_routed_alike():
    model = adapted(tiny_bert().double())
    batch = tokens()
    expected = model(**batch).last_hidden_state
    weights = model.routing_weights()["model"]
    embeds = model.base_model.model.embeddings.word_embeddings(batch["input_ids"])
    found = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).last_hidden_state
    assert (model.routing_weights()["model"] - weights).abs().max() < 1e-12
    assert (found - expected).abs().max() < 1e-10


def test_the_router_learns_through_every_layer():
    model = adapted(tiny_vit(), router_input="embeddings", decorrelation_weight=0.0)
    model(**pictures()).pooler_output.square().sum().backward()
    for name, parameter in model.named_parameters():
        if "mola_router" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_model_that_takes_pixels_is_routed_by_them_unless_told_otherwise():
    assert adapted(tiny_vit()).peft_config["default"].router_input == "pixels"
    assert adapted(tiny_bert()).peft_config["default"].router_input == "embeddings"
    assert routers(adapted(tiny_vit(), variant="grad")) == []


# ---- dual encoders ----


@pytest.mark.parametrize("router_input", ["pixels", "embeddings"])
@pytest.mark.parametrize("new", [tiny_clip, tiny_siglip, tiny_dual_encoder])
def test_each_tower_is_routed_by_its_own_input(new, router_input):
    model, inputs = clip(new, router_input=router_input)
    assert len(routers(model)) == 1
    given = captured(model)
    with torch.no_grad():
        model(**inputs)
        weights = model.routing_weights()
        assert set(weights) == {"image", "text"} == set(given)
        for tower in given:
            assert all(torch.equal(part, weights[tower]) for part in given[tower])
        # Other captions beside the same pictures move the weights of the text tower only.
        other = inputs | {"input_ids": inputs["input_ids"].flip(0), "attention_mask": None}
        model(**other)
        assert torch.equal(model.routing_weights()["image"], weights["image"])
        assert not torch.allclose(model.routing_weights()["text"], weights["text"])


@pytest.mark.parametrize("router_input", ["pixels", "embeddings"])
@pytest.mark.parametrize("new", [tiny_clip, tiny_siglip, tiny_dual_encoder])
def test_captions_and_images_alone_have_the_embeddings_they_have_together(new, router_input):
    model, inputs = clip(new, router_input=router_input)
    with torch.no_grad():
        expected = model(**inputs)
        weights = model.routing_weights()
        captions = model.get_text_features(**texts(inputs)).pooler_output
        assert set(model.routing_weights()) == {"text"}
        assert torch.allclose(model.routing_weights()["text"], weights["text"], atol=1e-6)
        images = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        assert set(model.routing_weights()) == {"image"}
    assert torch.allclose(F.normalize(captions), expected.text_embeds, atol=1e-5)
    assert torch.allclose(F.normalize(images), expected.image_embeds, atol=1e-5)
    with torch.no_grad():
        few = model.get_text_features(**{name: value[:1] for name, value in texts(inputs).items()}).pooler_output
    assert torch.allclose(F.normalize(few), expected.text_embeds[:1], atol=1e-5)


def test_more_captions_than_images():
    base, processor = tiny_clip()
    inputs = tiny_inputs(base, processor, CAPTIONS[:7])
    model = adapted(base)
    with torch.no_grad():
        assert model(**inputs).logits_per_image.shape == (4, 7)
    assert {tower: tuple(weights.shape) for tower, weights in model.routing_weights().items()} == {
        "image": (4, 3),
        "text": (7, 3),
    }


class WithoutInputEmbeddings(ResNetModel):
    """A model that declares no input layer, as the wrapper of transformers around timm's models."""

    def get_input_embeddings(self):
        return None


@pytest.mark.parametrize("router_input", [None, "embeddings"])
def test_a_model_that_declares_no_input_layer_is_routed_by_its_first(router_input):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
    model = adapted(WithoutInputEmbeddings(config), router_input=router_input)
    network = routers(model)[0].branches["model"]
    assert isinstance(network, EmbeddingRouter if router_input else PixelRouter)
    model(**pictures())
    weights = model.routing_weights()["model"]
    assert torch.allclose(weights.sum(1), torch.ones(4)) and (weights[0] - weights[1]).abs().max() > 1e-5


# ---- a router of one's own ----


class ByLength(nn.Module):
    def __init__(self, num_experts):
        super().__init__()
        self.slope = nn.Parameter(torch.linspace(-1, 1, num_experts))

    def forward(self, input_ids, attention_mask=None, **others):
        return attention_mask.sum(1, keepdim=True) * self.slope


def test_a_registered_router_takes_the_inputs_of_the_model_by_name():
    seen = []
    register_router("length", lambda config, model: seen.append((config, model)) or ByLength(config.num_experts))
    base, batch = tiny_bert(), tokens()
    model = adapted(base, router_input="length")
    assert seen[0][0] is model.peft_config["default"] and seen[0][1] is base
    model(**batch)
    expected = (batch["attention_mask"].sum(1, keepdim=True) * torch.linspace(-1, 1, 3)).softmax(1)
    assert torch.allclose(model.routing_weights()["model"], expected)
    by_position = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    assert torch.allclose(model.routing_weights()["model"], expected)
    by_position.sum().backward()
    assert routers(model)[0].branches["all"].slope.grad.abs().sum() > 0


def test_names_of_routers():
    with pytest.raises(ValueError, match="router_input='colour': must be 'pixels', 'embeddings' or a registered name"):
        adapted(tiny_bert(), router_input="colour")
    with pytest.raises(ValueError, match="'pixels' is a built-in router"):
        register_router("pixels", lambda config, model: nn.Identity())


def test_an_unknown_router_leaves_the_model_untouched():
    base, batch = tiny_bert(), tokens()
    expected = base(**batch).last_hidden_state
    with pytest.raises(ValueError, match="'colour'"):
        get_peft_model(base, MolaConfig(router_input="colour"))
    assert mola_routing(base) is None and torch.equal(base(**batch).last_hidden_state, expected)
    adapted(base)


# ---- what does not fit ----


def test_pixels_are_no_input_of_a_text_model():
    with pytest.raises(
        ValueError, match="router_input='pixels', but BertModel takes no pixel_values: use 'embeddings'"
    ):
        adapted(tiny_bert(), router_input="pixels")


def test_a_pixel_router_needs_images_of_the_right_shape():
    model = adapted(tiny_vit())
    with pytest.raises(ValueError, match=r"needs pixel_values of shape \(B, 3, height, width\), got \(4, 1, 16, 16\)"):
        model(pixel_values=torch.zeros(4, 1, 16, 16))
    with pytest.raises(ValueError, match="pixel_values is missing: the router of adapter 'default' looks at pixels"):
        model()
    model(**pictures())


def test_a_part_of_the_model_cannot_be_called_by_itself():
    model = adapted(tiny_bert())
    states = torch.randn(4, 6, 16)
    layer = model.base_model.model.encoder.layer[0]
    with pytest.raises(RuntimeError, match="router of adapter 'default' has not seen the input: call the whole model"):
        layer(states)


def test_the_batch_of_a_layer_must_be_the_one_that_was_routed():
    model = adapted(tiny_bert())
    layer = next(module for module in model.modules() if isinstance(module, MolaLayer))
    model.get_base_model().register_forward_hook(lambda *_: layer(torch.randn(3, 16)), prepend=True)
    with pytest.raises(ValueError, match="A layer got a batch of 3, but the router had 4 samples"):
        model(**tokens())


def test_images_given_by_position_are_routed_too():
    model = adapted(tiny_vit().double())
    batch = pictures(dtype=torch.float64)
    expected = model(**batch).last_hidden_state
    assert torch.equal(model(batch["pixel_values"]).last_hidden_state, expected)
