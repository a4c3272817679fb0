"""A choice of experts holds for one call: threads, layers by themselves, and inputs of other forms."""

import copy
import inspect
import threading
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from testing.tiny_bases import adapted, pictures, tiny_bert, tiny_vit, tokens
from testing.tiny_models import CAPTIONS, tiny_clip, tiny_inputs
from torch import nn
from transformers import (
    FSMTConfig,
    FSMTModel,
    LongformerConfig,
    LongformerModel,
    Siglip2Config,
    Siglip2Model,
    XLNetConfig,
    XLNetModel,
)

from hf_dissect.mola import MolaConfig, MolaLayer, mola_routing
from hf_dissect.mola.arguments import read_mask

TASKS = torch.tensor([2, 0, 1, 0])


def layers(model):
    return [module for module in model.modules() if isinstance(module, MolaLayer)]


# ---- no choice outlives its call ----


@pytest.mark.parametrize("fields", [{"router_input": "embeddings"}, {"variant": "grad"}], ids=["router", "grad"])
def test_a_layer_by_itself_never_sees_the_experts_of_a_past_batch(fields):
    model = adapted(tiny_bert(), **fields)
    x = torch.randn(4, 6, 16)
    layer = layers(model)[0]
    with torch.no_grad():
        if "variant" not in fields:
            model(**tokens())
            with pytest.raises(RuntimeError, match="has not seen the input: call the whole model"):
                layer(x)
            return
        expected = layer(x)  # the mean of the experts
        model(**tokens(), task_ids=TASKS)
        assert torch.equal(layer(x), expected)
        model.set_task(1)
        assert not torch.allclose(layer(x), expected)
    with pytest.raises(ValueError, match="task_ids are missing"):
        model.set_task(None)
        model.train()
        layer(x)


@pytest.mark.parametrize("use_reentrant", [True, False, None])
def test_no_layer_sees_the_experts_of_a_backward_pass_that_is_over(use_reentrant):
    model = adapted(tiny_vit(), router_input="pixels").train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model(**pictures()).last_hidden_state.sum().backward()
    with pytest.raises(RuntimeError, match="has not seen the input"):
        layers(model)[0](torch.randn(4, 5, 16))
    assert not mola_routing(model).passes._in_backward


def test_a_call_that_fails_leaves_nothing_behind():
    model = adapted(tiny_bert(), router_input="embeddings")
    with pytest.raises(Exception):  # noqa: B017
        model(input_ids=torch.full((4, 6), 10**6))
    assert mola_routing(model).passes.current is None
    model(**tokens())


@pytest.mark.parametrize("fields", [{"router_input": "pixels"}, {"variant": "grad"}], ids=["router", "grad"])
def test_threads_do_not_see_each_others_experts(fields):
    model = adapted(tiny_vit(), **fields)
    batches = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    tasks = [(TASKS + seed) % 3 for seed in range(4)]
    given = [{"task_ids": task} if "variant" in fields else {} for task in tasks]
    with torch.no_grad():
        expected = [model(pixel_values=x, **more).last_hidden_state for x, more in zip(batches, given, strict=True)]
    barrier, wrong = threading.Barrier(4), []
    model.get_base_model().layers[0].register_forward_pre_hook(lambda *_: barrier.wait(20) and None)

    def call(number):
        for _ in range(5):
            with torch.no_grad():
                found = model(pixel_values=batches[number], **given[number]).last_hidden_state
            if not torch.allclose(found, expected[number], atol=1e-6):
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- names and arguments ----


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mola, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.mola(x))


def test_a_module_called_mola_in_the_base_model_survives(tmp_path):
    torch.manual_seed(0)
    base, x = Net(), torch.randn(3, 4)
    expected = base(x)
    fields = {"target_modules": ["head"], "router_input": "embeddings"}
    model = adapted(copy.deepcopy(base), **fields)
    assert isinstance(model.get_base_model().mola, nn.Linear)
    found = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x), found)
    plain = model.unload()
    assert isinstance(plain.mola, nn.Linear) and torch.equal(plain(x), expected)
    assert {name for name, _ in plain.named_modules()} == {name for name, _ in base.named_modules()}


def test_a_base_model_with_all_of_our_names_is_refused():
    base = Net()
    base._mola = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Net has attributes mola and _mola"):
        adapted(base, target_modules=["head"], variant="grad")
    assert isinstance(base._mola, nn.Linear) and isinstance(base.head, nn.Linear)


def test_unload_gives_the_methods_of_the_base_back():
    base = tiny_bert()
    signature = inspect.signature(base.forward)
    model = adapted(base, variant="grad")
    assert "task_ids" in inspect.signature(base.forward).parameters
    plain = model.unload()
    assert inspect.signature(plain.forward) == signature and "forward" not in vars(plain)


def test_a_mask_by_position_hides_padding_from_the_router():
    model = adapted(tiny_bert(), router_input="embeddings")
    ids = tokens()["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    model(input_ids=ids, attention_mask=mask)
    expected = model.routing_weights()["model"]
    model(input_ids=ids)
    assert not torch.allclose(model.routing_weights()["model"], expected)
    model(ids, mask)
    assert torch.equal(model.routing_weights()["model"], expected)


@pytest.mark.parametrize("form", ["dict", "dict of one", "4-D bool", "4-D added", "4-D causal"])
def test_masks_of_any_form_are_read(form):
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:], mask[1, :2] = 0, 0
    wide = mask.bool()[:, None, None].expand(-1, 1, 6, -1)
    added = torch.where(wide, 0.0, torch.finfo(torch.float32).min)
    given = {
        "dict": {"sliding_attention": None, "full_attention": wide},
        "dict of one": {"full_attention": mask},
        "4-D bool": wide,
        "4-D added": added.to(torch.bfloat16),
        "4-D causal": wide & torch.ones(6, 6, dtype=torch.bool).tril(),
    }[form]
    assert torch.equal(read_mask(given).bool(), mask.bool())
    assert read_mask(None) is None and read_mask({"full_attention": None}) is None


def test_a_model_of_patches_is_routed_by_its_embeddings():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Siglip2Config(
        vision_config={**small, "num_patches": 16, "patch_size": 4},
        text_config={**small, "vocab_size": 32, "projection_size": 16},
    )
    model = get_peft_model(Siglip2Model(config), MolaConfig(num_experts=3, r=2)).eval()
    assert model.peft_config["default"].router_input == "embeddings"
    model(
        pixel_values=torch.randn(2, 16, 48),
        pixel_attention_mask=torch.ones(2, 16, dtype=torch.long),
        spatial_shapes=torch.tensor([[4, 4], [4, 4]]),
        input_ids=torch.randint(0, 32, (2, 5)),
    )
    assert {tower: tuple(w.shape) for tower, w in model.routing_weights().items()} == {"image": (2, 3), "text": (2, 3)}


def test_a_grad_adapter_without_tasks_says_once_what_it_does():
    model = adapted(tiny_bert(), variant="grad")
    with pytest.warns(UserWarning, match="without task_ids: it takes the mean of the experts"):
        model(**tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**tokens())


# ---- the dimension of the samples ----


def longformer(length):
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    config.attention_window = [4, 4]
    return LongformerModel(config).double().eval(), ["query", "value", "dense"]


def xlnet(length):
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=32, d_model=16, n_layer=2, n_head=2, d_inner=32)
    return XLNetModel(config).double().eval(), ["layer_1", "layer_2"]


def fsmt(length):
    torch.manual_seed(0)
    small = {"src_vocab_size": 32, "tgt_vocab_size": 32, "d_model": 16, "langs": ["en", "de"]}
    layers = {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return FSMTModel(FSMTConfig(**small, **layers, **heads)).eval(), ["fc1", "fc2", "q_proj", "v_proj"]


class SequenceFirst(nn.Module):
    """A transformer of torch on `(L, B, D)`."""

    def __init__(self, known: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 16)
        self.encoder = (
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0) if known else nn.Sequential(nn.Linear(16, 16))
        )

    def forward(self, input_ids):
        return self.encoder(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)


def torch_encoder(length):
    return SequenceFirst().double().eval(), ["linear1", "linear2"]


@pytest.mark.parametrize("length", [3, 4, 6, 8, 12])
@pytest.mark.parametrize("fields", [{"router_input": "embeddings"}, {"variant": "grad"}], ids=["router", "grad"])
@pytest.mark.parametrize("make", [longformer, xlnet, fsmt, torch_encoder])
def test_a_batch_equals_its_samples_where_the_sequence_comes_first(make, fields, length):
    base, targets = make(length)
    model = adapted(base, target_modules=targets, alpha=64.0, **fields).train()  # torch's fast path is for evaluation
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for part in base.modules():
        for name in ("dropout", "activation_dropout", "attention_dropout", "encoder_layerdrop", "decoder_layerdrop"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    ids = torch.randint(3, 32, (4, length), generator=torch.Generator().manual_seed(length))

    def call(rows):
        found = model(input_ids=ids[rows], **({"task_ids": TASKS[rows]} if "variant" in fields else {}))
        return found if torch.is_tensor(found) else found[0]

    together = call(slice(0, 4))
    for row in range(4):
        assert (call(slice(row, row + 1))[0] - together[row]).abs().max() < (1e-4 if make is fsmt else 1e-10)


def test_a_layer_that_may_compute_on_either_dimension_is_refused_until_it_is_named():
    ids = torch.randint(0, 32, (4, 8))
    fields = {"variant": "grad", "target_modules": ["encoder.0"]}
    model = adapted(SequenceFirst(known=False).double(), **fields)
    with pytest.raises(ValueError, match="8 rows in a batch of 4 samples.*sequence_first"):
        model(ids, task_ids=TASKS)
    with pytest.raises(ValueError, match="A layer got a batch of 7"):
        model(ids[:, :7], task_ids=TASKS)
    for named in (["encoder.0"], ["0"], r"encoder\.\d"):
        model = adapted(SequenceFirst(known=False).double(), sequence_first=named, **fields)
        together = model(ids, task_ids=TASKS)
        for row, task in enumerate(TASKS):
            alone = model(ids[row : row + 1], task_ids=task[None])
            assert (alone[0] - together[row]).abs().max() < 1e-10


def test_towers_may_be_called_inside_another_models_pass():
    base, processor = tiny_clip()
    inputs = tiny_inputs(base, processor, CAPTIONS[:4])
    model = adapted(base)
    expected = model(**inputs)
    other = adapted(tiny_vit())
    other.get_base_model().register_forward_hook(lambda *_: model(**inputs))
    other(**pictures())
    found = model(**inputs)
    assert torch.equal(found.logits_per_image, expected.logits_per_image)


@pytest.mark.parametrize("fields", [{}, {"variant": "grad"}], ids=["router", "grad"])
@pytest.mark.parametrize(("make", "inputs"), [(tiny_bert, tokens), (tiny_vit, pictures)])
def test_a_compiled_model_is_one_graph(make, inputs, fields):
    model, batch = adapted(make(), **fields), inputs()
    if fields:
        batch["task_ids"] = TASKS
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(**batch).last_hidden_state, expected, atol=1e-5)
        if fields:
            batch["task_ids"] = (TASKS + 1) % 3
        else:
            batch = {name: value[:3] for name, value in batch.items()}
        assert torch.allclose(compiled(**batch).last_hidden_state, model(**batch).last_hidden_state, atol=1e-5)
        assert mola_routing(model).passes.current is None


def test_the_weights_of_a_compiled_pass_are_the_last_ones():
    model = adapted(tiny_bert(), router_input="embeddings")
    model(**tokens(5))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for size in (3, 4):
        compiled(**tokens(size))
        found, projections = model.routing_weights()["model"], mola_routing(model).projections()
        assert projections["default", "model"].shape == (size, 32)
        model(**tokens(size))
        assert torch.allclose(found, model.routing_weights()["model"], atol=1e-6)
