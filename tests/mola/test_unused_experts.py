"""A step must not move an expert that it does not use, nor its part of the optimiser's state, but all others."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel, get_peft_model
from testing import expert_ranks, tiny_models
from testing.launched import on_ranks
from testing.tiny_bases import adapted, pictures, tiny_bert, tiny_bert_classifier, tiny_gpt2, tiny_resnet, tokens
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from transformers import Trainer, TrainingArguments

from hf_dissect import DissectTrainer, DissectTrainingArguments
from hf_dissect.mola import MolaConfig, MolaLayer, unused_experts

EXPERTS = 4
BATCH = 4


def make(base=tiny_bert, init_weights=True, **fields):
    fields = {"variant": "grad", "num_experts": EXPERTS, "init_weights": init_weights} | fields
    return adapted(base(), **fields).train()


def experts(model, name="default"):
    """Weights by the name of the parameter, `(E, ...)`."""
    parts = ("mola_A", "mola_B", "mola_norm")
    return {key: value for key, value in model.named_parameters() if any(f"{part}.{name}" in key for part in parts)}


def snapshot(model, optimizer=None, name="default"):
    """Copies of all that has a row for each expert: weights and state."""
    rows = {key: value.detach().clone() for key, value in experts(model, name).items()}
    if optimizer is not None:
        for key, parameter in experts(model, name).items():
            for entry, value in optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value) and value.dim() and len(value) == len(parameter):
                    rows[f"{key} {entry}"] = value.clone()
    return rows


def moved(before, after):
    """Experts of which anything differs."""
    assert before.keys() <= after.keys()
    return {e for key, value in before.items() for e in range(len(value)) if not torch.equal(value[e], after[key][e])}


def backward(model, tasks, inputs=tokens, factor=1.0):
    batch = inputs(len(tasks))
    output = model(**batch, task_ids=torch.tensor(tasks)).last_hidden_state
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape) * factor).sum().backward()


def step(model, optimizer, tasks, inputs=tokens):
    optimizer.zero_grad()
    backward(model, tasks, inputs)
    optimizer.step()


OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1),
    "adamw foreach": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw fused": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1, fused=True),
    "adamw loop": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1, foreach=False, amsgrad=True),
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.01, weight_decay=0.1, amsgrad=True),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=True),
    "sgd dampening": lambda weights: torch.optim.SGD(weights, lr=0.01, weight_decay=0.1, momentum=0.9, dampening=0.5),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.01, weight_decay=0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, weight_decay=0.1, momentum=0.5, centered=True),
    "adadelta": lambda weights: torch.optim.Adadelta(weights, weight_decay=0.1),
    "adamax": lambda weights: torch.optim.Adamax(weights, weight_decay=0.1),
    "nadam": lambda weights: torch.optim.NAdam(weights, weight_decay=0.1),
    "radam": lambda weights: torch.optim.RAdam(weights, weight_decay=0.1),
    "rprop": lambda weights: torch.optim.Rprop(weights),
    "adafactor": lambda weights: torch.optim.Adafactor(weights, weight_decay=0.1),
    "adafactor of transformers": lambda weights: transformers.Adafactor(weights, weight_decay=0.1, beta1=0.9),
    "adafactor of transformers, fixed": lambda weights: transformers.Adafactor(
        weights, lr=0.01, weight_decay=0.1, relative_step=False, scale_parameter=False
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("init_weights", [True, False], ids=["B zero", "B random"])
def test_unused_experts_keep_weights_and_state(kind, init_weights):
    model = make(init_weights=init_weights)
    optimizer = OPTIMIZERS[kind](model.parameters())
    before = snapshot(model, optimizer)
    step(model, optimizer, [0, 2, 2, 0])
    assert moved(before, snapshot(model, optimizer)) == {0, 2}  # never used before
    after = snapshot(model, optimizer)
    if kind not in ("rprop", "adagrad"):
        for key, value in after.items():  # they start like those of a new parameter
            if " " in key and "var" not in key and "sq_" not in key:
                assert not value[[1, 3]].any(), key
    step(model, optimizer, [0, 1, 2, 3])
    before = snapshot(model, optimizer)
    for _ in range(3):
        step(model, optimizer, [2, 0, 2, 2])
    assert moved(before, snapshot(model, optimizer)) == {0, 2}  # used before, with momentum
    before = snapshot(model, optimizer)
    step(model, optimizer, [1, 1, 1, 1])
    assert moved(before, snapshot(model, optimizer)) == {1}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_used_experts_move_as_without_hooks(kind, monkeypatch):
    """Bit for bit, in runs in which each expert that is compared was used in each step."""
    results = []
    for hooked in (True, False):
        model = make(init_weights=False)
        if not hooked:
            monkeypatch.setattr(unused_experts, "_layers", {})
        optimizer = OPTIMIZERS[kind](model.parameters())
        # Adafactor scales its steps by the mean square of the whole parameter, in which the other experts count.
        steps = 1 if kind in ("adafactor", "adafactor of transformers") else 3
        for tasks in ([0, 2, 2, 0], [2, 0, 2, 0], [2, 2, 0, 2])[:steps]:
            step(model, optimizer, tasks)
        results.append(snapshot(model, optimizer))
    hooked, plain = results
    assert moved(plain, hooked) <= {1, 3}
    if kind != "rprop":
        assert moved(plain, hooked) == {1, 3}  # what the hooks are for


@pytest.mark.parametrize(
    ("base", "inputs", "fields"),
    [
        (tiny_gpt2, tokens, {"target_modules": ["c_attn", "c_proj"]}),
        (tiny_resnet, pictures, {}),
        (tiny_bert, tokens, {"rank_pattern": {"query": 1}, "dropout": 0.5, "target_modules": "all-linear"}),
    ],
    ids=["Conv1D", "Conv2d", "ranks and dropout"],
)
def test_other_layers(base, inputs, fields):
    model = make(base, **fields)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for tasks in ([0, 1, 2, 3], [3, 3, 0, 0]):
        before = snapshot(model, optimizer)
        step(model, optimizer, tasks, inputs)
        assert moved(before, snapshot(model, optimizer)) == set(tasks)


def test_gradients_are_accumulated():
    model = make()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step(model, optimizer, [0, 1, 2, 3])
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    for tasks in ([0, 0], [2, 2], [0, 2]):
        backward(model, tasks)
    optimizer.step()
    assert moved(before, snapshot(model, optimizer)) == {0, 2}
    # Zeros that are left from another step are no use.
    for _ in range(2):
        before = snapshot(model, optimizer)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        assert moved(before, snapshot(model, optimizer)) == set()


@pytest.mark.parametrize("fields", [{"default_task": 3}, {}], ids=["default task", "fixed task"])
def test_training_one_task(fields):
    model = make(**fields)
    if not fields:
        model.set_task(3)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for _ in range(2):
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        model(**tokens()).last_hidden_state.square().sum().backward()
        optimizer.step()
        assert moved(before, snapshot(model, optimizer)) == {3}


def test_a_scaler_and_a_step_that_it_skips():
    model = make()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    for factor, expected in ((1.0, {1, 2}), (float("inf"), set()), (1.0, {1, 2})):
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        backward(model, [1, 2, 1, 1], factor=scaler.get_scale() * factor)
        scaler.scale(torch.ones(()))  # makes the scale
        scaler.step(optimizer)
        scaler.update()
        assert moved(before, snapshot(model, optimizer)) == expected


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "lbfgs"])
def test_a_closure(kind, by_name):
    model = make()
    if kind == "lbfgs":
        optimizer = torch.optim.LBFGS(experts(model).values(), max_iter=3)
    else:
        optimizer = OPTIMIZERS[kind](model.parameters())

    def closure():
        optimizer.zero_grad()
        backward(model, [1, 2, 1, 1])
        return torch.tensor(1.5)

    for _ in range(2):
        before = snapshot(model)
        assert (optimizer.step(closure=closure) if by_name else optimizer.step(closure)) == 1.5
        assert moved(before, snapshot(model)) == {1, 2}


def test_two_adapters_and_a_frozen_one():
    model = make()
    model.add_adapter("second", MolaConfig(variant="grad", num_experts=2, r=3, init_weights=False))
    model.add_adapter("frozen", MolaConfig(variant="grad", num_experts=2, r=3, init_weights=False))
    model.add_adapter("router", MolaConfig(num_experts=2))
    model.base_model.set_adapter(["default", "second"])
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for _ in range(2):
        before = {name: snapshot(model, optimizer, name) for name in ("default", "second", "frozen", "router")}
        step(model, optimizer, [1, 1, 1, 1])
        after = {name: snapshot(model, optimizer, name) for name in before}
        assert [moved(before[name], after[name]) for name in before] == [{1}, {1}, set(), set()]
    model.base_model.set_task(0, "second")
    model.delete_adapter("default")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = snapshot(model, optimizer, "second")
    step(model, optimizer, [0, 0, 0, 0])
    assert moved(before, snapshot(model, optimizer, "second")) == {0}


def test_two_optimizers_of_one_model():
    """With B at zero, the gradient of A is zero for all experts at first: that alone does not make one unused."""
    model = make()
    A = [value for key, value in experts(model).items() if "mola_A" in key and "pooler" not in key]
    B = [value for key, value in experts(model).items() if "mola_B" in key and "pooler" not in key]
    optimizers = [torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1) for weights in (A, B)]
    before = snapshot(model)
    backward(model, [0, 2, 0, 2])
    assert not any(weight.grad.any() for weight in A)
    for optimizer in optimizers:
        optimizer.step()
    assert moved(before, snapshot(model)) == {0, 2}
    for key, value in before.items():
        if "mola_A" in key and "pooler" not in key:
            assert not torch.equal(value[0], experts(model)[key][0])  # weight decay, as without the hooks


def test_state_that_is_resumed(tmp_path):
    model = make()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step(model, optimizer, [0, 1, 2, 3])
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    resumed = make(init_weights=False)
    weights, state = torch.load(tmp_path / "state.pt")
    resumed.load_state_dict(weights)
    second = OPTIMIZERS["adamw"](resumed.parameters())
    second.load_state_dict(state)
    for pair in ((model, optimizer), (resumed, second)):
        before = snapshot(*pair)
        step(*pair, [1, 1, 1, 1])
        assert moved(before, snapshot(*pair)) == {1}
    assert moved(snapshot(model, optimizer), snapshot(resumed, second)) == set()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model(copied):
    model = copied(make())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = snapshot(model, optimizer)
    step(model, optimizer, [1, 1, 1, 1])
    assert moved(before, snapshot(model, optimizer)) == {1}


def test_a_loaded_adapter_trains_on(tmp_path):
    make(init_weights=False).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True).train()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step(model, optimizer, [0, 1, 2, 3])
    before = snapshot(model, optimizer)
    step(model, optimizer, [1, 1, 1, 1])
    assert moved(before, snapshot(model, optimizer)) == {1}


class ScaledAdamW(torch.optim.AdamW):
    """Its step calls that of its parent, and moves the weights itself."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(0.9)
        return loss


def test_a_step_within_a_step():
    model = make(init_weights=False)
    torch.optim.AdamW(model.parameters())  # the step of the parent has the hooks, too
    optimizer = ScaledAdamW([value for value in model.parameters() if value.requires_grad])
    for _ in range(2):
        before = snapshot(model, optimizer)
        step(model, optimizer, [1, 1, 1, 1])
        assert moved(before, snapshot(model, optimizer)) == {1}
    assert not any(unused_experts._steps[optimizer])


def test_a_step_that_fails_does_not_spoil_the_next():
    model = make(init_weights=False)
    optimizer = OPTIMIZERS["adamw"](model.parameters())

    def closure():
        raise KeyError("batch")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    before = snapshot(model, optimizer)
    step(model, optimizer, [1, 1, 1, 1])
    assert moved(before, snapshot(model, optimizer)) == {1}


def test_the_router_variant_is_left_alone():
    model = adapted(tiny_bert(), num_experts=2).train()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = snapshot(model, optimizer)
    model(**tokens()).last_hidden_state.square().sum().backward()
    for parameter in experts(model).values():
        if parameter.grad is not None:
            parameter.grad[1] = 0
    optimizer.step()
    assert moved(before, snapshot(model, optimizer)) == {0, 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    base = tiny_bert().to(dtype)
    config = MolaConfig(variant="grad", num_experts=EXPERTS, r=2, init_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).train()
    assert all(value.dtype == dtype for value in experts(model).values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = snapshot(model, optimizer)
    step(model, optimizer, [3, 1, 1, 3])
    assert moved(before, snapshot(model, optimizer)) == {1, 3}


def test_gradients_of_negative_zero_and_of_not_a_number():
    model = make(init_weights=False)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = snapshot(model)
    for parameter in experts(model).values():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[0] = -0.0
    last = list(experts(model).values())[0]
    last.grad[1].view(-1)[-1] = torch.nan
    last.grad[2].view(-1)[0] = -torch.finfo(torch.float32).tiny * 2**-20  # the smallest numbers are no zeros
    optimizer.step()
    assert moved(before, snapshot(model)) == {1, 2}


def test_a_compiled_step():
    model = make(init_weights=False)
    optimizer = OPTIMIZERS["adamw foreach"](model.parameters())
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        backward(model, [1, 2, 1, 1])
        compiled()
        assert moved(before, snapshot(model, optimizer)) == {1, 2}


class PackedState(torch.optim.SGD):
    """Keeps its momentum in 8 bits with one scale, as optimisers of 8 bits do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["packed"] = torch.zeros_like(parameter, dtype=torch.uint8)
                    parameter.mul_(0.9)


def test_packed_state_is_left_alone_with_a_warning():
    unused_experts._warn_once.cache_clear()
    model = make(init_weights=False)
    optimizer = PackedState(model.parameters())
    before = snapshot(model)
    with pytest.warns(UserWarning, match="PackedState packs its state.*weights stay, but its momentum decays"):
        step(model, optimizer, [1, 1, 1, 1])
    assert moved(before, snapshot(model)) == {1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, [1, 1, 1, 1])


def test_other_optimizers_and_deleted_models_cost_nothing():
    for hooks, own in (
        (_global_optimizer_pre_hooks, unused_experts._before_step),
        (_global_optimizer_post_hooks, unused_experts._after_step),
    ):
        assert sum(getattr(hook, "_torchdynamo_orig_callable", hook) is own for hook in hooks.values()) == 1
    model = make()
    numbers = set(unused_experts._layers)
    layers = {id(layer) for layer in model.modules() if isinstance(layer, MolaLayer)}
    assert layers <= {id(layer) for layer in unused_experts._layers.values()}
    backward(model, [0, 0, 0, 0])
    other = nn.Linear(2, 2)
    optimizer = OPTIMIZERS["adamw"](other.parameters())
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    del model
    gc.collect()
    assert len(set(unused_experts._layers) & numbers) <= len(numbers) - len(layers)


def test_accelerate():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = make(), None
    model, optimizer = accelerator.prepare(model, OPTIMIZERS["adamw"](model.parameters()))
    plain = accelerator.unwrap_model(model)
    before = snapshot(plain, optimizer.optimizer)
    for tasks in ([1, 1, 1, 1], [3, 3, 3, 3]):
        with accelerator.accumulate(model):
            output = model(**tokens(), task_ids=torch.tensor(tasks)).last_hidden_state
            accelerator.backward(output.square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert moved(before, snapshot(plain, optimizer.optimizer)) == {1, 3}


def test_two_processes_agree(tmp_path):
    on_ranks([2], tmp_path, expert_ranks.check_all)


def rows_by_task(tasks):
    """A row of captions' tokens for each task, with labels, for a plain Trainer."""
    inputs = tokens(8)
    return Dataset.from_list(
        [
            {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": i % 3, "task_ids": tasks[i]}
            for i, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True))
        ]
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad"])
def test_the_trainer_of_transformers(optim, tmp_path):
    model = adapted(tiny_bert_classifier(), variant="grad", num_experts=EXPERTS)
    before = snapshot(model)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            optim=optim,
            learning_rate=0.01,
            weight_decay=0.1,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            remove_unused_columns=False,
            use_cpu=True,
            save_strategy="steps",
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows_by_task([0, 3] * 4),
    )
    trainer.train()
    assert moved(before, snapshot(model)) == {0, 3}
    final = snapshot(model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert moved(before, snapshot(model)) == {0, 3} and moved(final, snapshot(model)) == set()


def test_the_trainer_of_selected_pairs(tmp_path):
    model, processor = tiny_models.tiny_clip()
    model = tiny_models.with_mola(model, "grad", num_experts=3)
    pairs = tiny_models.tiny_pairs(32)
    before = snapshot(model)
    DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=pairs.add_column("task", [0, 2] * 16),
        args=DissectTrainingArguments(
            str(tmp_path),
            task_column="task",
            weight_decay=0.1,
            learning_rate=0.01,
            per_device_train_batch_size=8,
            max_steps=3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
    ).train()
    assert moved(before, snapshot(model)) == {0, 2}


@pytest.mark.parametrize("base", [tiny_resnet, tiny_bert])
def test_norms_of_tasks_do_not_move_either(base):
    """Affine and statistics of the tasks that a step does not use."""
    inputs = pictures if base is tiny_resnet else tokens
    model = make(base, task_norms=True)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for tasks in ([0, 1, 2, 3], [3, 3, 0, 0]):
        before = snapshot(model, optimizer, "default")
        norms = {key: value.clone() for key, value in model.state_dict().items() if "mola_norm" in key}
        step(model, optimizer, tasks, inputs)
        assert moved(before, snapshot(model, optimizer)) == set(tasks)
        assert norms and moved(norms, model.state_dict()) == set(tasks)


def test_attention_keeps_unused_experts():
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = adapted(base, variant="grad", num_experts=EXPERTS, target_modules=["self_attn", "linear1"]).train()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for tasks in ([0, 1, 2, 3], [3, 3, 0, 0]):
        before = snapshot(model, optimizer)
        optimizer.zero_grad()
        model(torch.randn(4, 5, 16), task_ids=torch.tensor(tasks)).square().sum().backward()
        optimizer.step()
        assert any("out_proj" in key for key in before) and moved(before, snapshot(model, optimizer)) == set(tasks)
