"""Who gets which experts: task ids and what stands in for them, and that each expert learns from its task only."""

import copy
import pickle

import pytest
import torch
from testing.tiny_bases import adapted, pictures, tiny_bert, tiny_regnet, tiny_resnet, tokens
from testing.tiny_models import CAPTIONS, Wrapper, tiny_clip, tiny_inputs

from hf_dissect.mola import MolaLayer, mola_routing

TASKS = torch.tensor([2, 0, 1, 0])


def experts(model, adapter_name="default"):
    for module in model.modules():
        if isinstance(module, MolaLayer):
            yield from (module.mola_A[adapter_name], module.mola_B[adapter_name])


def pooled(model, **batch):
    return model(**batch).pooler_output


# ---- an expert and its task ----


@pytest.mark.parametrize(
    ("make", "inputs", "targets"),
    [(tiny_bert, tokens, None), (tiny_resnet, pictures, None), (tiny_regnet, pictures, ["convolution"])],
)
def test_an_expert_learns_from_its_task_only(make, inputs, targets):
    model = adapted(make(), variant="grad", num_experts=4, target_modules=targets)
    batch = inputs()
    output = pooled(model, **batch, task_ids=TASKS)
    reached = [torch.autograd.grad(row.sum(), list(experts(model)), retain_graph=True) for row in output]
    for i, task in enumerate(TASKS.tolist()):
        for gradient in reached[i]:
            others = [t for t in range(4) if t != task]
            assert torch.equal(gradient[others], torch.zeros_like(gradient[others]))
        assert sum(gradient[task].abs().sum() for gradient in reached[i]) > 0
    output.sum().backward()
    for parameter in experts(model):
        assert torch.equal(parameter.grad[3], torch.zeros_like(parameter.grad[3])), "an unused expert gets zero"


def test_a_batch_of_one_task_leaves_the_other_experts_a_gradient_of_zero():
    model = adapted(tiny_bert(), variant="grad")
    pooled(model, **tokens(), task_ids=torch.full((4,), 1)).sum().backward()
    for parameter in experts(model):
        assert torch.equal(parameter.grad[[0, 2]], torch.zeros_like(parameter.grad[[0, 2]]))
    assert sum(parameter.grad[1].abs().sum() for parameter in experts(model)) > 0


def test_a_mixed_batch_equals_its_samples_one_by_one():
    model = adapted(tiny_bert().double(), variant="grad")
    batch = tokens()
    together = pooled(model, **batch, task_ids=TASKS)
    for i, task in enumerate(TASKS):
        alone = pooled(model, **{name: value[i : i + 1] for name, value in batch.items()}, task_ids=task[None])
        assert (alone[0] - together[i]).abs().max() < 1e-10


def test_both_towers_of_a_dual_encoder_follow_the_task_ids():
    base, processor = tiny_clip()
    inputs = tiny_inputs(base, processor, CAPTIONS[:4])
    model = adapted(base.double(), variant="grad")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    together = model(**inputs, task_ids=TASKS)
    for i, task in enumerate(TASKS):
        row = {name: value[i : i + 1] for name, value in inputs.items()}
        alone = model(**row, task_ids=task[None])
        other = model(**row, task_ids=(task[None] + 1) % 3)
        for name in ("image_embeds", "text_embeds"):
            assert (alone[name][0] - together[name][i]).abs().max() < 1e-10
            assert (other[name][0] - together[name][i]).abs().max() > 1e-3


def test_a_tower_called_by_itself_takes_task_ids_too():
    base, processor = tiny_clip()
    inputs = tiny_inputs(base, processor, CAPTIONS[:4])
    model = adapted(base, variant="grad")
    with torch.no_grad():
        expected = model(**inputs, task_ids=TASKS)
        images = model.get_image_features(pixel_values=inputs["pixel_values"], task_ids=TASKS).pooler_output
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        captions = model.get_text_features(**texts, task_ids=TASKS).pooler_output
    assert torch.allclose(torch.nn.functional.normalize(images), expected.image_embeds, atol=1e-6)
    assert torch.allclose(torch.nn.functional.normalize(captions), expected.text_embeds, atol=1e-6)


# ---- no task ids ----


def test_task_ids_missing_in_training_are_an_error():
    model = adapted(tiny_bert(), variant="grad").train()
    with pytest.raises(ValueError, match="task_ids are missing: adapter 'default' trains an expert per task"):
        model(**tokens())
    model(**tokens(), task_ids=TASKS)


def test_task_ids_missing_in_evaluation_mean_the_mean_of_the_experts():
    model = adapted(tiny_resnet().double(), variant="grad", target_modules=["embedder.embedder.convolution"])
    batch = pictures(dtype=torch.float64)
    layer = next(module for module in model.modules() if isinstance(module, MolaLayer))
    rows = []
    layer.register_forward_hook(lambda module, args, output: rows.append(output))
    model(**batch)
    for task in range(3):
        model(**batch, task_ids=torch.full((4,), task))
    assert (rows[0] - torch.stack(rows[1:]).mean(0)).abs().max() < 1e-10


def test_the_default_task_stands_in_for_task_ids():
    model = adapted(tiny_bert(), variant="grad", default_task=2).train()
    batch = tokens()
    expected = pooled(model, **batch, task_ids=torch.full((4,), 2))
    assert torch.equal(pooled(model, **batch), expected)
    assert torch.equal(pooled(model.eval(), **batch), expected)
    assert not torch.allclose(pooled(model, **batch, task_ids=torch.full((4,), 0)), expected)


def test_set_task_stands_in_for_task_ids_until_it_is_taken_back():
    model = adapted(tiny_bert(), variant="grad")
    batch = tokens()
    mean, by_task = pooled(model, **batch), [pooled(model, **batch, task_ids=torch.full((4,), t)) for t in range(3)]
    for task in (1, 0, 2):
        model.set_task(task)
        assert torch.equal(pooled(model, **batch), by_task[task])
        assert torch.equal(pooled(model, **batch, task_ids=torch.full((4,), 1)), by_task[1]), "task_ids prevail"
    model.set_task(None)
    assert torch.equal(pooled(model, **batch), mean)


@pytest.mark.parametrize("task", [3, -1, 1.5, "1", True, torch.tensor(7)])
def test_set_task_refuses_what_is_no_task(task):
    model = adapted(tiny_bert(), variant="grad")
    with pytest.raises(ValueError, match="adapter 'default' has the tasks 0 to 2"):
        model.set_task(task)


def test_a_router_needs_no_task():
    model = adapted(tiny_bert())
    with pytest.raises(ValueError, match="'default' has a router: it needs no task"):
        model.set_task(0)
    batch = tokens()
    assert torch.equal(pooled(model, **batch, task_ids=TASKS), pooled(model, **batch)), "task_ids are ignored"


# ---- bad task ids ----

BAD = {
    "a list": ([0, 1, 2, 0], TypeError, "task_ids is a list; it must be an int64 tensor"),
    "an int": (1, TypeError, "task_ids is a int; it must be an int64 tensor"),
    "int32": (TASKS.int(), TypeError, "task_ids is a torch.int32 tensor; it must be an int64"),
    "float": (TASKS.float(), TypeError, "task_ids is a torch.float32 tensor; it must be an int64"),
    "bool": (TASKS.bool(), TypeError, "task_ids is a torch.bool tensor; it must be an int64"),
    "short": (TASKS[:3], ValueError, r"task_ids has shape \(3,\); it must have one task for each of the 4"),
    "long": (TASKS.repeat(2), ValueError, r"task_ids has shape \(8,\); it must have one task for each of the 4"),
    "scalar": (TASKS[0], ValueError, r"task_ids has shape \(\); it must have one task for each of the 4"),
    "matrix": (TASKS[:, None], ValueError, r"task_ids has shape \(4, 1\); it must have one task for each of the 4"),
    "empty": (TASKS[:0], ValueError, r"task_ids has shape \(0,\); it must have one task for each of the 4"),
    "too high": (TASKS + 1, ValueError, "task_ids from 1 to 3: adapter 'default' has the tasks 0 to 2"),
    "negative": (TASKS - 1, ValueError, "task_ids from -1 to 1: adapter 'default' has the tasks 0 to 2"),
    "elsewhere": (TASKS.to("meta"), ValueError, "task_ids are on meta, the other inputs on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_task_ids_are_refused_and_the_model_still_works(case):
    task_ids, error, message = BAD[case]
    model = adapted(tiny_bert(), variant="grad")
    expected = pooled(model, **tokens(), task_ids=TASKS)
    with pytest.raises(error, match=message):
        model(**tokens(), task_ids=task_ids)
    assert torch.equal(pooled(model, **tokens(), task_ids=TASKS), expected)
    assert torch.equal(pooled(model.train(), **tokens(), task_ids=TASKS), expected)


def test_a_failed_pass_does_not_leave_its_tasks_behind():
    model = adapted(tiny_bert(), variant="grad")
    mean = pooled(model, **tokens())
    with pytest.raises(Exception, match="inputs_embeds"):
        model(task_ids=TASKS)
    assert torch.equal(pooled(model, **tokens()), mean)
    with pytest.raises(ValueError, match="task_ids are missing"):
        model.train()(**tokens())


# ---- what a trainer asks, and copies ----


def test_the_routing_is_found_in_any_wrapper():
    base = tiny_bert()
    assert mola_routing(base) is None
    model = adapted(base, variant="grad")
    routing = mola_routing(base)
    assert mola_routing(model) is routing and mola_routing(Wrapper(model)) is routing
    assert routing.needs_task_ids and not routing.decorrelates
    with model.disable_adapter():
        assert not routing.needs_task_ids
    assert routing.needs_task_ids
    router = mola_routing(adapted(tiny_bert()))
    assert router.decorrelates and not router.needs_task_ids
    assert not mola_routing(adapted(tiny_bert(), decorrelation_weight=0.0)).decorrelates


def test_the_decorrelation_loss_needs_a_forward_pass_with_a_router():
    routing = mola_routing(adapted(tiny_bert()))
    with pytest.raises(RuntimeError, match="decorrelation_loss needs a forward pass"):
        routing.decorrelation_loss(TASKS)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("fields", [{"variant": "grad"}, {"router_input": "embeddings"}])
def test_a_copy_after_a_pass_with_gradient_has_a_routing_of_its_own(clone, fields):
    model = adapted(tiny_bert(), **fields)
    other = tokens(4, length=5)
    first = pooled(model, **tokens(), task_ids=TASKS)
    copied = clone(model)
    first.sum().backward()
    assert mola_routing(copied) is not mola_routing(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    # Each pass through one model must leave the weights in force in the other alone.
    assert torch.equal(pooled(copied, **tokens(), task_ids=TASKS), first)
    before = mola_routing(copied).last_weights()
    pooled(model, **other, task_ids=(TASKS + 1) % 3)
    for tower, weights in mola_routing(copied).last_weights().items():
        assert torch.equal(weights, before[tower])
    assert not torch.allclose(pooled(model, **tokens(), task_ids=TASKS), first)


def test_a_copy_of_the_base_model_inside_is_routed_by_itself():
    model = adapted(tiny_bert(), router_input="embeddings")
    expected = pooled(model, **tokens())
    inner = copy.deepcopy(model.base_model.model)
    assert torch.equal(pooled(inner, **tokens()), expected)
    assert mola_routing(inner) is not mola_routing(model)
