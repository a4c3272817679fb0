"""What a run minimises: the contrastive loss while it warms up, then GSC's with labels that move once an epoch."""

import json

import pytest
import torch
import torch.nn.functional as F
from testing import tiny_models
from testing.faulty_run import make_trainer

from hf_dissect import DissectTrainer, DissectTrainingArguments, SampleLedger
from hf_dissect.data import as_pairs, shuffle_captions
from hf_dissect.evaluation.selection_figures import compute_label_figures
from hf_dissect.losses import ContrastiveLoss
from hf_dissect.models.loading import logit_scale_and_bias
from hf_dissect.objective import Objective
from hf_dissect.objectives.gsc import GscObjective
from hf_dissect.selection import STRATEGIES, Selection, SelectionStrategy

IDS = torch.tensor([3, 9, 4, 1, 30, 22])


@pytest.fixture(scope="module")
def clip():
    """A model in training mode, and its outputs for six pairs."""
    model, processor = tiny_models.tiny_clip()
    inputs = tiny_models.tiny_inputs(model, processor, tiny_models.CAPTIONS[:4])
    inputs = {name: torch.cat([value, value[:2]]) for name, value in inputs.items()}
    return model.train(), model(**inputs)


@pytest.fixture
def ledger() -> SampleLedger:
    ledger = SampleLedger(40, columns=GscObjective().columns)
    ledger.write("y_cm", IDS[:4], torch.tensor([0.9, 0.2, 0.5, 1.0]))
    ledger.write("y_im", IDS[:4], torch.tensor([0.7, 0.8, 0.5, 0.0]))
    return ledger


LABELS = torch.tensor([0.7, 0.2, 0.5, 0.0, 1.0, 1.0])


def written_out(outputs, labels: torch.Tensor, masks: torch.Tensor, gamma: float) -> torch.Tensor:
    """The loss of GSC with every matrix in full."""
    images, texts = outputs["image_embeds"], outputs["text_embeds"]
    logits = texts @ images.T / 0.07
    across = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()) / 2
    geometry = (images @ images.T * masks) @ (texts @ texts.T * masks).T
    return (labels * (across - gamma * geometry.log_softmax(1).diagonal())).mean()


def loss_of(objective: Objective, model, outputs, ledger, **batch) -> torch.Tensor:
    batch = {"sample_id": IDS, **batch}
    return objective.compute_loss(model, batch, outputs, *logit_scale_and_bias(model), ledger)


def test_the_contrastive_loss_gives_way_to_that_of_the_soft_labels(clip, ledger):
    model, outputs = clip
    objective = Objective("softmax", robust=GscObjective(gamma=0.5, warmup_epochs=2))
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 0.5])
    contrastive = ContrastiveLoss()(outputs, weights=weights)
    for epoch in (0, 1):
        objective.on_epoch_begin(epoch)
        torch.testing.assert_close(loss_of(objective, model, outputs, ledger, pair_weight=weights), contrastive)
    objective.on_epoch_begin(2)
    plain = loss_of(objective, model, outputs, ledger)
    torch.testing.assert_close(plain, written_out(outputs, LABELS, LABELS, 0.5))
    weighted = loss_of(objective, model, outputs, ledger, pair_weight=weights)
    product = LABELS * weights
    torch.testing.assert_close(weighted, written_out(outputs, product, product, 0.5))


def test_the_scale_of_the_model_is_left_alone_but_has_a_gradient(clip, ledger):
    model, outputs = clip
    objective = Objective("softmax", robust=GscObjective(warmup_epochs=0))
    loss = loss_of(objective, model, outputs, ledger)
    (gradient,) = torch.autograd.grad(loss, [model.logit_scale], retain_graph=True)
    assert gradient == 0  # None would keep DDP waiting


def test_the_evidence_is_that_of_the_pairs_and_their_labels(clip, ledger):
    outputs = clip[1]
    evidence = Objective("softmax", robust=GscObjective(temperature=0.2)).compute_evidence(outputs, IDS, ledger)
    images, texts = outputs["image_embeds"].detach(), outputs["text_embeds"].detach()
    logits = texts @ images.T / 0.2
    agreement = (logits.softmax(1).diagonal() + logits.softmax(0).diagonal()) / 2
    masks = LABELS
    structure = F.cosine_similarity(images @ images.T * masks, texts @ texts.T * masks)
    torch.testing.assert_close(evidence, {"agreement": agreement, "structure": structure})
    assert Objective("softmax").compute_evidence(outputs, IDS, ledger) == {}


def test_impossible_settings_are_told():
    with pytest.raises(ValueError, match="gsc: .* model trains with the sigmoid loss; use a model of the softmax"):
        Objective("sigmoid", robust=GscObjective())
    for settings in ({"warmup_epochs": -1}, {"warmup_epochs": True}, {"dual": 1}, {"beta": 0}, {"gamma": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
            GscObjective(**settings)


# ---- in a run ----

GSC = {"warmup_epochs": 1}
SMALL = {"selection_options": None, "gsc": GSC}


def small_trainer(folder, *, family: str = "tiny_clip", strategy=None, train=None, **settings) -> DissectTrainer:
    model, processor = getattr(tiny_models, family)()
    compares = getattr(STRATEGIES.get(settings.get("selection_strategy")), "reference", "")
    defaults = dict(per_device_train_batch_size=16, num_train_epochs=3, learning_rate=1e-3, save_run_folder=False)
    settings = {**defaults, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **settings}
    return DissectTrainer(
        model=model,
        processing_class=processor,
        train_dataset=shuffle_captions(tiny_models.tiny_pairs(64), rate=0.25) if train is None else train,
        args=DissectTrainingArguments(str(folder), use_cpu=True, **settings),
        strategy=strategy,
        reference_model=getattr(tiny_models, family)(seed=9)[0] if compares else None,
    )


def state_of(trainer: DissectTrainer) -> dict[str, torch.Tensor]:
    columns = {name: trainer.ledger.column(name).clone() for name in trainer.ledger.columns}
    return columns | {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerances) -> None:
    torch.testing.assert_close(one, other, equal_nan=True, **(tolerances or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_labels_move_with_every_strategy(strategy, tmp_path):
    trainer = small_trainer(tmp_path, selection_strategy=strategy, gsc=GSC, num_train_epochs=4)
    trainer.train()
    y_cm, y_im = trainer.ledger.column("y_cm"), trainer.ledger.column("y_im")
    known = ~y_cm.isnan()
    assert known.sum() > 30 and known.equal(~y_im.isnan())
    assert y_cm[known].unique().numel() > 20 and ((y_cm[known] > 0) & (y_cm[known] < 1)).all()
    assert ((y_im[known] >= 0) & (y_im[known] <= 1)).all()
    assert (~trainer.ledger.column("agreement").isnan()).sum() >= 32  # evidence of the last epoch


def test_labels_are_the_moving_averages_of_what_the_steps_showed(tmp_path):
    """One step an epoch, weights that stay: the evidence is that of all pairs under the first weights, each time."""
    trainer = small_trainer(
        tmp_path,
        selection_strategy="none",
        per_device_train_batch_size=64,
        learning_rate=0.0,
        gsc={"beta": 0.6, "temperature": 0.05},
    )
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(64)])
    with torch.no_grad():
        outputs = trainer.model(**{key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")})
    logits = outputs["logits_per_text"] / trainer.model.logit_scale.exp() / 0.05
    agreement = (logits.softmax(1).diagonal() + logits.softmax(0).diagonal()) / 2
    # Two updates, before the second and the third epoch: 1 -> 0.6 q + 0.4 -> 0.6 q + 0.4 (0.6 q + 0.4).
    torch.testing.assert_close(trainer.ledger.column("y_cm"), 0.84 * agreement + 0.16, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trainer.ledger.column("agreement"), agreement, rtol=1e-4, atol=1e-5)


RUNS = {
    "map, accumulation": dict(gradient_accumulation_steps=2, dropout=0.1),
    "stream, two workers": dict(stream=True, dataloader_num_workers=2),
    "map, gradient caching": dict(grad_cache_chunk_size=3),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("step", [8, 12])  # two epochs of 8 steps (4 with accumulation): at a boundary and within
def test_a_resumed_run_has_the_labels_of_the_uninterrupted_one(run, step, tmp_path):
    settings = dict(
        SMALL, selection_strategy="random", record_selection=False, save_steps=4, max_steps=20, **RUNS[run]
    )
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    assert whole.ledger.column("y_cm").isfinite().sum() > 30
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.selector.updated_epoch == whole.selector.updated_epoch >= 2
    assert_same(state_of(resumed), state_of(whole))


class CountsUpdates(SelectionStrategy):
    name = "counts_updates"

    def __init__(self):
        super().__init__()
        self.told = []

    def needs_scores(self, epoch):
        return False

    def update(self, ledger):
        self.told.append("update")

    def on_epoch_begin(self, epoch, ledger):
        self.told.append(epoch)

    def select(self, scores, ledger, k):
        return Selection(torch.arange(k))


def test_an_epoch_is_begun_once_and_not_again_at_a_resume(tmp_path):
    def trainer():
        return small_trainer(tmp_path, strategy=CountsUpdates(), save_strategy="steps", save_steps=1)

    whole = trainer()
    whole.train()
    assert whole.strategy.told == [0, "update", 1, "update", 2]
    # 4 steps an epoch; a resume first tells the epoch of the checkpoint, then the Trainer begins one.
    for step, told in {3: [0, 0, "update", 1, "update", 2], 4: [0, "update", 1, "update", 2]}.items():
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.strategy.told == told
    within = trainer()
    within.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert within.strategy.told == [1, 1, "update", 2]


class ForeignStream(torch.utils.data.IterableDataset):
    """64 pairs that come one after the other from a place we know nothing of."""

    def __iter__(self):
        yield from as_pairs(tiny_models.tiny_pairs(64))


def test_the_epoch_of_a_foreign_stream_that_begins_again_is_not_updated_again(tmp_path):
    def trainer():
        settings = dict(num_train_epochs=1, max_steps=10, save_strategy="steps", save_steps=6)
        return small_trainer(tmp_path, strategy=CountsUpdates(), train=ForeignStream(), **settings)

    whole = trainer()
    whole.train()
    assert whole.strategy.told == [0, "update", 1, "update", 2]
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.strategy.told[:2] == [1, 1] and resumed.strategy.told[2:] in ([], ["update", 2])


def test_gradient_caching_and_accumulation_change_nothing_but_the_memory(tmp_path):
    ends = []
    for chunk_size in (None, 3):
        trainer = small_trainer(
            tmp_path,
            selection_strategy="random",
            gsc={"gamma": 0.1},
            optim="sgd",
            learning_rate=0.05,
            grad_cache_chunk_size=chunk_size,
            gradient_accumulation_steps=2,
        )
        trainer.train()
        ends.append(state_of(trainer))
    assert_same(*ends, rtol=1e-3, atol=1e-4)


def test_measured_figures_reach_the_record_of_a_strategy(tmp_path):
    class KeepsNearest(SelectionStrategy):
        name = "keeps_nearest"
        columns = ("distance",)

        def measure(self, scores, ledger):
            return {"distance": (scores.image_embeds - scores.text_embeds).norm(dim=-1)}

        def record(self, sample_id, correlation, ledger, measured=None):
            ledger.write("distance", sample_id, measured["distance"])

        def select(self, scores, ledger, k):
            return Selection(torch.arange(k))

    trainer = small_trainer(tmp_path, strategy=KeepsNearest(), num_train_epochs=2)
    trainer.train()
    # |a - b|^2 = 2 - 2 a.b; the correlation is 100 a.b, but never below 0.
    squared = trainer.ledger.column("distance").square()
    expected = 2 - trainer.ledger.column("correlation") / 50
    seen = expected < 2
    assert seen.sum() > 20
    torch.testing.assert_close(squared[seen], expected[seen], rtol=1e-4, atol=1e-4)


def test_a_model_of_the_sigmoid_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trains with the sigmoid loss"):
        small_trainer(tmp_path, family="tiny_siglip", gsc={})


def test_the_metrics_tell_how_well_the_labels_separate(tmp_path):
    trainer = small_trainer(tmp_path, selection_strategy="ncr", gsc={}, save_run_folder=True)
    trainer.train()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 <= metrics["selection"]["label_auroc"] <= 1 and 0 <= metrics["selection"]["p_clean_auroc"] <= 1
    assert metrics["settings"]["gsc"]["beta"] == 0.7

    ledger = SampleLedger(6, columns=("y_cm", "y_im", "p_clean"))
    clean, ids = torch.tensor([True, True, False, False, True, False]), torch.arange(6)
    ledger.write("y_cm", ids[:4], torch.tensor([0.9, 0.6, 0.9, 0.5]))
    ledger.write("y_im", ids[:4], torch.tensor([0.9, 0.7, 0.1, 0.8]))  # the minima: 0.9, 0.6, 0.1, 0.5
    ledger.write("p_clean", ids[[1, 2, 3]], torch.tensor([0.5, 0.9, 0.1]))
    assert compute_label_figures(ledger, ids, clean) == {"label_auroc": 1.0, "p_clean_auroc": 0.5}
    assert compute_label_figures(SampleLedger(6), ids, clean) == {}
