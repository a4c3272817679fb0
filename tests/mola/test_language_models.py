"""Language models: a router reads the prompt, never what is predicted, and generation holds its choice."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from testing.tiny_bases import adapted
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache, StaticCache

from hf_dissect.mola import MolaConfig, mola_routing, register_router

VOCABULARY = 8


def tiny_llama(seed: int = 0, **fields) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    fields = {"vocab_size": VOCABULARY, "pad_token_id": None, "eos_token_id": None, "bos_token_id": None} | fields
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **fields,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2_lm(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).eval()


def prompts(batch_size: int = 3, length: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(seed))


BASES = {"llama": tiny_llama, "gpt2": tiny_gpt2_lm}


def routed(make=tiny_llama, **fields) -> PeftModel:
    model = adapted(make(), variant="router", **fields)
    with torch.no_grad():  # so that prompts are routed in ways of their own
        for name, parameter in model.named_parameters():
            if "mola_router" in name and "scores" in name:
                parameter.mul_(30)
    return model


# ---- nothing of what is predicted ----


@pytest.mark.parametrize("how", ["labels", "own loss"])
@pytest.mark.parametrize("base", BASES)
def test_a_router_cannot_learn_to_tell_what_comes_next(base, how):
    """Tokens at random have an entropy of log 8 = 2.079; a router that sees them gets below 1."""
    model = adapted(BASES[base](), variant="router", num_experts=4, r=8, alpha=64.0, decorrelation_weight=0.0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(150):
        tokens = torch.randint(0, VOCABULARY, (64, 4), generator=generator)
        if how == "labels":
            loss = model(input_ids=tokens, labels=tokens).loss
        else:
            logits = model(input_ids=tokens).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-30:]) / 30 > 2.07


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("inputs", ["input_ids", "inputs_embeds", "position"])
def test_with_labels_the_weights_depend_on_the_tokens_before_the_first_label_only(inputs, padding):
    model, tokens = routed(), prompts()
    labels = tokens.clone()
    labels[:, :3] = -100  # the first three are the prompt
    mask = torch.ones_like(tokens)
    if padding == "left":
        mask[:, 0], labels[:, 0] = 0, -100
    elif padding == "right":
        mask[:, -1], labels[:, -1] = 0, -100

    def weights(tokens):
        batch = {"attention_mask": mask, "labels": labels}
        if inputs == "position":
            model(tokens, **batch)
        elif inputs == "input_ids":
            model(input_ids=tokens, **batch)
        else:
            model(inputs_embeds=model.get_input_embeddings()(tokens), **batch)
        return model.routing_weights()["model"]

    expected = weights(tokens)
    answer, prompt, padded = tokens.clone(), tokens.clone(), tokens.clone()
    answer[:, 3:] = (answer[:, 3:] + 1) % VOCABULARY
    prompt[:, 1] = (prompt[:, 1] + 1) % VOCABULARY
    padded[mask == 0] = (padded[mask == 0] + 1) % VOCABULARY
    assert torch.equal(weights(answer), expected) and torch.equal(weights(padded), expected)
    assert (weights(prompt) - expected).abs().amax(1).min() > 1e-4


def test_rows_have_prompts_of_their_own_length():
    model, tokens = routed(), prompts(2)
    labels = tokens.clone()
    labels[0, :2], labels[1, :4] = -100, -100
    model(input_ids=tokens, labels=labels)
    together = model.routing_weights()["model"]
    for row, length in ((0, 2), (1, 4)):
        model(input_ids=tokens[row : row + 1, :length], logits_to_keep=1)
        assert torch.allclose(model.routing_weights()["model"][0], together[row], atol=1e-6)


def test_without_labels_it_reads_the_first_token_and_says_so_once():
    model, tokens = routed(), prompts()
    with pytest.warns(UserWarning, match="reads the prompt only.*Pass labels"):
        model(input_ids=tokens)
    expected = model.routing_weights()["model"]
    other = tokens.clone()
    other[:, 1:] = (other[:, 1:] + 1) % VOCABULARY
    model(input_ids=other)
    assert torch.equal(model.routing_weights()["model"], expected)


def test_predictions_of_some_positions_do_not_make_all_of_it_a_prompt():
    model, tokens = routed(), prompts()
    model(input_ids=tokens)
    expected = model.routing_weights()["model"]
    for kept in (torch.tensor([1, 5]), 2, 0):
        model(input_ids=tokens, logits_to_keep=kept)
        assert torch.equal(model.routing_weights()["model"], expected)
    model(input_ids=tokens, logits_to_keep=1)
    assert not torch.allclose(model.routing_weights()["model"], expected)


def test_a_router_of_ones_own_sees_no_more_than_the_prompt():
    seen = {}

    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = torch.nn.Linear(VOCABULARY, 3)

        def forward(self, input_ids, **others):
            seen.update(others, input_ids=input_ids)
            return self.scores(F.one_hot(input_ids, VOCABULARY).float().mean(1))

    register_router("counts of tokens", lambda config, model: Counts())
    model, tokens = adapted(tiny_llama(), router_input="counts of tokens"), prompts()
    labels = tokens.clone()
    labels[:, :3] = -100
    model(input_ids=tokens, labels=labels)
    assert "labels" not in seen
    assert torch.equal(seen["input_ids"][:, :3], tokens[:, :3]) and not seen["input_ids"][:, 3:].any()
    assert torch.equal(seen["attention_mask"], (torch.arange(6) < 3).long().expand(3, -1))


# ---- generation ----

HOW = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "two of each": {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
}


def generate(model, tokens, **settings):
    kept = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    found = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **kept | settings)
    return found.sequences, torch.stack(found.logits, 1)


@pytest.mark.parametrize("native", [False, True], ids=["peft", "native"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("base", BASES)
def test_generation_with_and_without_a_cache_agrees(base, how, native):
    model, tokens = routed(BASES[base]), prompts()
    called = model.get_base_model() if native else model
    cached, logits = generate(called, tokens, use_cache=True, **HOW[how])
    uncached, other_logits = generate(called, tokens, use_cache=False, **HOW[how])
    assert torch.equal(cached, uncached)
    assert torch.allclose(logits, other_logits, atol=1e-5)
    for row in range(len(tokens)):  # nor do the others of the batch count
        alone, _ = generate(called, tokens[row : row + 1], **HOW[how])
        times = len(cached) // len(tokens)
        assert torch.equal(alone, cached[row * times : (row + 1) * times])


def test_the_weights_of_a_prompt_are_those_it_trains_with():
    model, tokens = routed(), prompts(length=9)
    labels = tokens.clone()
    labels[:, :5] = -100
    model(input_ids=tokens, labels=labels)
    trained = model.routing_weights()["model"]
    generate(model, tokens[:, :5])
    assert torch.allclose(model.routing_weights()["model"], trained, atol=1e-6)


@pytest.mark.parametrize("make_cache", [None, DynamicCache, "static"])
def test_a_loop_of_ones_own_with_a_cache_agrees_with_one_without(make_cache):
    model, tokens = routed(), prompts()
    cache = make_cache() if callable(make_cache) else None
    if make_cache == "static":
        cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        outputs = model(input_ids=tokens, use_cache=True, past_key_values=cache)
        sequence, logits = tokens, outputs.logits[:, -1]
        for _ in range(5):
            following = logits.argmax(-1, keepdim=True)
            sequence = torch.cat([sequence, following], 1)
            outputs = model(input_ids=following, past_key_values=outputs.past_key_values)
            logits = outputs.logits[:, -1]
        if make_cache is None:
            again = model(input_ids=sequence).logits[:, -1]
        else:  # an empty cache says that a prompt comes
            again = generate(model, tokens, max_new_tokens=6)[1][:, -1]
    assert torch.allclose(logits, again, atol=1e-5)


def test_a_cache_that_this_adapter_has_not_seen_is_refused():
    model, tokens = routed(), prompts()
    with model.disable_adapter(), torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="past_key_values was not routed by this adapter"):
        model(input_ids=tokens[:, :1], past_key_values=cache)


def test_two_conversations_in_turn_keep_their_own_weights():
    model = routed()
    first, second = prompts(seed=1), prompts(seed=2)
    with torch.no_grad():
        caches = [model(input_ids=tokens, use_cache=True).past_key_values for tokens in (first, second)]
        found = [
            model(input_ids=tokens[:, :1], past_key_values=cache).logits
            for tokens, cache in zip((first, second), caches, strict=True)
        ]
        expected = [
            model(input_ids=torch.cat([tokens, tokens[:, :1]], 1)).logits[:, -1:] for tokens in (first, second)
        ]
    for own, other in zip(found, expected, strict=True):
        assert torch.allclose(own, other, atol=1e-5)


def test_a_grad_adapter_generates_by_task():
    model, tokens = adapted(tiny_llama(), variant="grad", alpha=64.0), prompts(4)
    tasks = torch.tensor([2, 0, 1, 0])
    for settings in ({"use_cache": True}, {"use_cache": False}, {"num_beams": 2}):
        together, _ = generate(model, tokens, task_ids=tasks, **settings)
        for row, task in enumerate(tasks):
            alone, _ = generate(model, tokens[row : row + 1], task_ids=task[None], **settings)
            assert torch.equal(alone[0], together[row])
    model.set_task(2)
    fixed, _ = generate(model, tokens[:1])
    assert torch.equal(fixed, generate(model, tokens[:1], task_ids=torch.tensor([2]))[0])


def test_an_encoder_decoder_holds_the_weights_of_its_encoder():
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 0, None, 0
    model, tokens = routed(lambda: T5ForConditionalGeneration(config).eval()), prompts()
    cached, _ = generate(model, tokens, use_cache=True, num_beams=2)
    uncached, _ = generate(model, tokens, use_cache=False, num_beams=2)
    assert torch.equal(cached, uncached)
    with torch.no_grad():
        first, second = (model.get_encoder()(input_ids=prompts(seed=seed)) for seed in (1, 2))
        for encoded, seed in ((first, 1), (second, 2)):
            apart = model(encoder_outputs=encoded, decoder_input_ids=tokens).logits
            assert torch.allclose(
                apart, model(input_ids=prompts(seed=seed), decoder_input_ids=tokens).logits, atol=1e-5
            )


def test_a_model_of_images_and_text_is_routed_by_what_generate_gives_it():
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 16}
    text = {"model_type": "llama", "vocab_size": 20, "hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=19, image_seq_length=4)
    model = routed(lambda: LlavaForConditionalGeneration(config).eval(), target_modules=["q_proj", "v_proj"])
    assert model.peft_config["default"].router_input == "embeddings"
    tokens = torch.cat([torch.full((2, 4), 19), prompts(2)], 1)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    cached, _ = generate(model, tokens, use_cache=True, **batch)
    uncached, _ = generate(model, tokens, use_cache=False, **batch)
    assert torch.equal(cached, uncached)


def test_a_saved_adapter_generates_the_same(tmp_path):
    model, tokens = routed(), prompts()
    model.save_pretrained(tmp_path)
    expected, _ = generate(model, tokens)
    assert torch.equal(generate(PeftModel.from_pretrained(tiny_llama(), tmp_path), tokens)[0], expected)
    native = tiny_llama()
    native.load_adapter(str(tmp_path))
    assert torch.equal(generate(native, tokens)[0], expected)
    assert mola_routing(native) is not None and MolaConfig.from_pretrained(tmp_path).router_input == "embeddings"
