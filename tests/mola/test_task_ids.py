"""Task ids reach the experts through every wrapper and loop of PEFT and transformers."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from testing.tiny_bases import adapted, tiny_bert, tokens
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_dissect.mola import MolaConfig, mola_routing

TASKS = torch.tensor([2, 0, 1, 0])


def bert(kind):
    def make():
        torch.manual_seed(0)
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return kind(BertConfig(vocab_size=64, **small)).eval()

    return make


def llama():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, eos_token_id=None, **small)).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    config.decoder_start_token_id, config.eos_token_id = 0, None
    return T5ForConditionalGeneration(config).eval()


KINDS = {
    "CAUSAL_LM": (llama, {}),
    "SEQ_2_SEQ_LM": (t5, {"decoder_input_ids": torch.tensor([[0, 3]] * 4)}),
    "SEQ_CLS": (bert(BertForSequenceClassification), {}),
    "TOKEN_CLS": (bert(BertForTokenClassification), {}),
    "QUESTION_ANS": (bert(BertForQuestionAnswering), {}),
    "FEATURE_EXTRACTION": (bert(BertModel), {}),
    None: (bert(BertModel), {}),
}


def wrapped(task_type, **fields) -> PeftModel:
    fields = {"variant": "grad", "num_experts": 3, "r": 2, "init_weights": False} | fields
    torch.manual_seed(7)
    return get_peft_model(KINDS[task_type][0](), MolaConfig(task_type=task_type, **fields)).eval()


@pytest.mark.parametrize("task_type", KINDS)
def test_task_ids_pass_through_every_kind_of_peft_model(task_type):
    model, batch = wrapped(task_type), tokens() | KINDS[task_type][1]
    with torch.no_grad():
        together = model(**batch, task_ids=TASKS)[0]
        for row, task in enumerate(TASKS):
            alone = model(**{name: value[row : row + 1] for name, value in batch.items()}, task_ids=task[None])[0]
            assert torch.allclose(alone[0], together[row], atol=1e-5)
        other = model(**batch, task_ids=(TASKS + 1) % 3)[0]
    assert not torch.allclose(other, together, atol=1e-3)
    with pytest.raises(ValueError, match="task_ids from 0 to 5"):
        model(**batch, task_ids=torch.tensor([0, 1, 2, 5]))
    with pytest.raises(ValueError, match="task_ids are missing"):
        model.train()(**batch)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_task_ids_reach_generate(task_type):
    model, ids = wrapped(task_type, alpha=64.0), tokens()["input_ids"]
    together = model.generate(input_ids=ids, task_ids=TASKS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for row, task in enumerate(TASKS):
        alone = model.generate(
            input_ids=ids[row : row + 1], task_ids=task[None], max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert torch.equal(alone[0], together[row])
    with pytest.raises(ValueError, match="one task for each of the 4"):
        model.generate(input_ids=ids, task_ids=TASKS[:3], max_new_tokens=2, pad_token_id=0)


def test_another_adapter_type_of_peft_keeps_its_own_task_ids():
    from peft import PolyConfig

    model = get_peft_model(llama(), PolyConfig(task_type="CAUSAL_LM", r=2, n_tasks=3, n_skills=2, n_splits=1))
    model.eval()
    found = model(**tokens(), task_ids=TASKS).logits
    assert found.shape == (4, 6, 64) and mola_routing(model) is None


def rows(count=16):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 32, (count, 6), generator=generator).tolist()
    return [
        {"input_ids": ids[i], "attention_mask": [1] * 6, "labels": i % 2, "task_ids": i % 3, "title": "left out"}
        for i in range(count)
    ]


def train(model, tmp_path, **fields):
    from datasets import Dataset

    fields = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 0.05, "report_to": "none"} | fields
    fields |= {"disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **fields), train_dataset=Dataset.from_list(rows()))
    trainer.train()
    return trainer


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_the_plain_trainer_keeps_the_column_and_trains_each_expert_on_its_task(task_type, tmp_path):
    torch.manual_seed(7)
    config = MolaConfig(variant="grad", num_experts=4, r=2, task_type=task_type, target_modules=["query", "value"])
    model = get_peft_model(bert(BertForSequenceClassification)(), config)
    trainer = train(model, tmp_path, weight_decay=0.0)
    for name, parameter in model.named_parameters():
        if "mola_B" in name:
            moved = parameter.detach().abs().amax((1, 2))
            assert moved[:3].min() > 0 and moved[3] == 0, name
    predicted = trainer.predict(trainer.train_dataset)
    with torch.no_grad():
        batch = {name: torch.tensor([row[name] for row in rows()]) for name in ("input_ids", "attention_mask")}
        tasks = torch.tensor([row["task_ids"] for row in rows()])
        expected = model.eval()(**batch, task_ids=tasks).logits
    assert torch.allclose(torch.tensor(predicted.predictions), expected, atol=1e-5)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_the_plain_trainer_adds_the_decorrelation_of_a_router_to_the_loss(task_type, tmp_path):
    torch.manual_seed(7)
    config = MolaConfig(num_experts=4, r=2, task_type=task_type, target_modules=["query"], decorrelation_weight=0.5)
    model = get_peft_model(bert(BertForSequenceClassification)(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "projection" in name}
    train(model, tmp_path)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)

    batch = {name: torch.tensor([row[name] for row in rows(8)]) for name in ("input_ids", "attention_mask", "labels")}
    tasks = torch.tensor([row["task_ids"] for row in rows(8)])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    alone = model.train()(**batch).loss
    both = model(**batch, task_ids=tasks).loss
    assert torch.allclose(both - alone, mola_routing(model).decorrelation_loss(tasks), atol=1e-6)
    assert torch.equal(model.eval()(**batch, task_ids=tasks).loss, model(**batch).loss)


def test_a_pipeline_takes_task_ids(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = {word: number for number, word in enumerate(["[UNK]", "[PAD]", *(f"w{i}" for i in range(30))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    wrapped("CAUSAL_LM", alpha=64.0).save_pretrained(tmp_path)
    llama().save_pretrained(tmp_path / "base")
    adapter = MolaConfig.from_pretrained(tmp_path)
    adapter.base_model_name_or_path = str(tmp_path / "base")
    adapter.save_pretrained(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    generate = pipeline("text-generation", model=model, tokenizer=fast, device="cpu")
    texts = ["w1 w2 w3", "w4 w5 w6"]
    found = generate(texts, task_ids=torch.tensor([2, 0]), batch_size=2, max_new_tokens=5, do_sample=False)
    for text, task, row in zip(texts, (2, 0), found, strict=True):
        model.set_task(task)
        alone = generate(text, max_new_tokens=5, do_sample=False)
        assert alone[0]["generated_text"] == row[0]["generated_text"]


def test_a_model_that_takes_task_ids_itself_gets_them_too():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, x, task_ids):
            return self.layer(x) + task_ids[:, None]

    model = adapted(Net(), variant="grad", target_modules=["layer"])
    x = torch.randn(4, 4)
    found = model(x, task_ids=TASKS)
    model.set_task(2)
    assert torch.allclose(found[0], model(x[:1], task_ids=TASKS[:1])[0], atol=1e-6)


def test_missing_tasks_name_the_ways_out():
    with pytest.raises(
        ValueError, match=r"Call the model with task_ids=..., int64 \(B,\), or fix one task with set_task"
    ):
        adapted(tiny_bert(), variant="grad").train()(**tokens())
