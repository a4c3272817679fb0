"""Recipes: every kind of fault with its message, overrides, the round trip, and the recipes that are shipped."""

import copy
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_dissect import DissectTrainingArguments
from hf_dissect.hub.shared_recipe import select_shareable
from hf_dissect.recipe.file import read_description, shipped_recipes
from hf_dissect.recipe.objective_schema import NoisyChannelSection
from hf_dissect.recipe.recipe import (
    STRATEGIES,
    CompareSection,
    DataSection,
    EvaluationSection,
    GscSection,
    ModelSection,
    Recipe,
    RecipeError,
    SelectionSection,
    ZeroShotSection,
    parse_strategy,
)
from hf_dissect.recipe.schema import SCOPES, SOURCES
from hf_dissect.settings import list_settings

MINIMAL = {"name": "small", "model": {"config": {"model_type": "clip"}}}
DISTILLATION = ("amid-clip", "amid-utd-mhad")
SHIPPED = (
    "cc12m",
    "cc3m",
    "clip-finetune",
    "clip-finetune-noisy",
    "flickr8k-features",
    "flickr8k-local",
    "mola-grad",
    "mola-router",
    "quickstart",
    "siglip2-acid",
    "two-towers",
    "yfcc15m",
)


def minimal(**sections) -> dict:
    """The smallest sound recipe with other sections beside it or instead of its own."""
    return copy.deepcopy(MINIMAL | sections)


def faults_of(settings: dict) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(settings, "here.yaml")
    assert str(caught.value).startswith("here.yaml: ")
    return caught.value.faults


def load_error(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_defaults_are_those_of_the_contract():
    recipe = Recipe.from_dict(minimal())
    assert recipe.training == {} and recipe.description == "" and recipe.evaluation.zero_shot is None
    assert recipe.selection == SelectionSection("dissect", 0.5, "local", 1, {}, mask_false_negatives=False)
    assert (recipe.selection.rescore_every, recipe.selection.max_bad_fraction) == (1, 0.01)
    assert recipe.compare == CompareSection(["none", "random", "dissect"], [0])
    assert (recipe.data.source, recipe.data.train_split, recipe.data.num_workers) == ("scenes", "train", 0)
    assert (recipe.model.vocab_size, recipe.model.trust_remote_code) == (4096, False)
    assert ZeroShotSection(["cat"]).templates == ["a photo of a {}."]
    assert SelectionSection().options is not SelectionSection().options


@pytest.mark.parametrize(
    "section", [ModelSection, DataSection, SelectionSection, EvaluationSection, ZeroShotSection, CompareSection]
)
def test_every_setting_is_explained(section):
    for field in dataclasses.fields(section):
        assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        # unknown keys
        (
            {"selektion": {}},
            "selektion: unknown key (value {}); allowed: name, description, model, adapter, data, selection, "
            "objective, evaluation, training, compare; did you mean 'selection'?",
        ),
        (
            {"compare": {"seed": [1]}},
            "compare.seed: unknown key (value [1]); allowed: strategies, seeds; did you mean 'seeds'?",
        ),
        (
            {"training": {"learning_rte": 0.1}},
            "training.learning_rte: unknown key (value 0.1); allowed: average_weights, report_pairs and the fields of "
            "transformers.TrainingArguments; did you mean 'learning_rate'?",
        ),
        (
            {"selection": {"options": {"variante": "momentum"}}},
            "selection.options.variante: unknown key (value 'momentum'); "
            "allowed for dissect: variant, momentum, warmup_on",
        ),
        # wrong types
        ({"name": 3}, "name: 3 is not allowed; allowed: text"),
        ({"data": []}, "data: [] is not allowed; allowed: a mapping of settings"),
        ({"training": "fast"}, "training: 'fast' is not allowed; allowed: a mapping of settings"),
        ({"selection": {"ratio": "half"}}, "selection.ratio: 'half' is not allowed; allowed: a number"),
        ({"selection": {"record": "yes"}}, "selection.record: 'yes' is not allowed; allowed: true or false"),
        ({"data": {"num_workers": True}}, "data.num_workers: True is not allowed; allowed: an integer"),
        ({"data": {"num_workers": 1.0}}, "data.num_workers: 1.0 is not allowed; allowed: an integer"),
        ({"data": {"train_split": None}}, "data.train_split: None is not allowed; allowed: text"),
        ({"selection": {"options": [1]}}, "selection.options: [1] is not allowed; allowed: a mapping"),
        ({"compare": {"seeds": [0, "1"]}}, "compare.seeds: [0, '1'] is not allowed; allowed: a list (an integer)"),
        ({"compare": {"seeds": [0.5]}}, "compare.seeds: [0.5] is not allowed; allowed: a list (an integer)"),
        ({"compare": {"seeds": 1}}, "compare.seeds: 1 is not allowed; allowed: a list (an integer)"),
        (
            {"evaluation": {"zero_shot": {"classes": "cat"}}},
            "evaluation.zero_shot.classes: 'cat' is not allowed; allowed: a list (text)",
        ),
        ({"training": {"max_steps": 1.5}}, "training.max_steps: 1.5 is not allowed; allowed: an integer"),
        ({"training": {"bf16": 1}}, "training.bf16: 1 is not allowed; allowed: true or false"),
        ({"training": {"data_seed": "x"}}, "training.data_seed: 'x' is not allowed; allowed: an integer or null"),
        ({"training": {"weight_decay": 10**400}}, "is not allowed; allowed: a number"),
        # impossible values
        ({"name": "a/b"}, "name: 'a/b' is not allowed; allowed: letters, digits"),
        ({"name": ""}, "name: missing; allowed: letters, digits"),
        ({"description": "two\nlines"}, "description: 'two\\nlines' is not allowed; allowed: one line"),
        (
            {"model": {"config": {"model_type": "clip"}, "freeze": "both"}},
            "model.freeze: 'both' is not allowed; allowed: vision, text",
        ),
        ({"selection": {"ratio": 0}}, "selection.ratio: 0 is not allowed; allowed: a number in (0, 1]"),
        ({"selection": {"ratio": 1.5}}, "selection.ratio: 1.5 is not allowed; allowed: a number in (0, 1]"),
        ({"selection": {"ratio": float("nan")}}, "selection.ratio: nan is not allowed; allowed: a finite number"),
        ({"data": {"noise_rate": float("-inf")}}, "data.noise_rate: -inf is not allowed; allowed: a finite number"),
        (
            {"model": {"config": {"model_type": "clip", "sizes": [1, {"x": float("inf")}]}}},
            "model.config.sizes.1.x: inf is not allowed; allowed: a finite number",
        ),
        ({"selection": {"warmup_epochs": -1}}, "selection.warmup_epochs: -1 is not allowed; allowed: at least 0"),
        (
            {"selection": {"scoring_batch_size": 0}},
            "selection.scoring_batch_size: 0 is not allowed; allowed: at least 1",
        ),
        ({"data": {"noise_rate": 1}}, "data.noise_rate: 1 is not allowed; allowed: a number in [0, 1)"),
        ({"compare": {"seeds": [0, -1]}}, "compare.seeds: -1 is not allowed; allowed: a number in [0, 4294967295]"),
        (
            {"selection": {"strategy": "disect"}},
            "selection.strategy: 'disect' is not allowed; "
            "allowed: dissect, random, small_loss, big_loss, clipscore, ncr, gsc, "
            "info_batch, scan, divbs, forgetting, noisy_channel, learnability, rho, jest, coreset, none; "
            "did you mean 'dissect'?",
        ),
        (
            {"selection": {"options": {"variant": "warm"}}},
            "selection.options.variant: 'warm' is not allowed; allowed: warmup, momentum",
        ),
        (
            {"selection": {"options": {"momentum": 1.0}}},
            "selection.options.momentum: 1.0 is not allowed; allowed: a number in [0, 1)",
        ),
        (
            {"selection": {"options": {"warmup_on": "none"}}},
            "selection.options.warmup_on: 'none' is not allowed; allowed: subset, all",
        ),
        (
            {"training": {"lr_scheduler_type": "cosin"}},
            "training.lr_scheduler_type: 'cosin' is not allowed; allowed: linear, cosine, ",
        ),
        ({"training": {"log_level": "loud"}}, "training.log_level: 'loud' is not allowed; allowed: detail, debug, "),
        ({"training": {"num_train_epochs": 0}}, "training.num_train_epochs: 0 is not allowed; allowed: more than 0"),
        ({"training": {"max_steps": 0}}, "training.max_steps: 0 is not allowed; allowed: at least 1, or -1"),
        # settings that do not go together
        ({"model": {}}, "model.name_or_path: missing; set name_or_path (a trained model) or config"),
        (
            {"model": {"name_or_path": "x", "config": {"model_type": "clip"}}},
            "model.name_or_path: 'x' and model.config are both set",
        ),
        (
            {"model": {"config": {"projection_dim": 8}}},
            "model.config.model_type: None is not allowed; allowed: an architecture, such as clip",
        ),
        ({"data": {"source": "folder"}}, "data.path: missing; data.source folder needs one"),
        ({"data": {"path": "photos"}}, "data.path: 'photos' would not be read: data.source is scenes"),
        (
            {"data": {"source": "folder", "path": "x", "name": "y"}},
            "data.name: 'y' is only for data.source hub, not folder",
        ),
        (
            {"data": {"source": "folder", "path": "d", "separator": "; "}},
            "data.separator: '; ' is not allowed; allowed: one character, such as ';', or tab",
        ),
        (
            {"data": {"source": "folder", "path": "d", "separator": ""}},
            "data.separator: '' is not allowed",
        ),
        (
            {"data": {"source": "folder", "path": "d", "encoding": "ansi2"}},
            "data.encoding: 'ansi2' is not allowed; allowed: utf-8, cp1252, latin-1, utf-16 or another",
        ),
        (
            {"data": {"source": "hub", "path": "d", "encoding": "cp1252"}},
            "data.encoding: 'cp1252' is only for data.source folder, imagefolder, not hub; leave it out",
        ),
        (
            {"data": {"image_root": "pictures"}},
            "data.image_root: 'pictures' is only for data.source folder, imagefolder, hub, not scenes",
        ),
        (
            {
                "data": {"source": "hub", "path": "d", "image_root": "p", "streaming": True},
                "training": {"max_steps": 5},
            },
            "data.image_root: 'p' needs the rows at hand; set data.streaming to false",
        ),
        (
            {"data": {"source": "folder", "path": "d", "class_template": "a photo"}},
            "data.class_template: 'a photo' is not allowed; allowed: text with {} or {class} for the class",
        ),
        (
            {"data": {"noise_rate": 0.2, "noise_permutation": "o.npy"}},
            "data.noise_permutation: 'o.npy' and data.noise_rate 0.2 are both set",
        ),
        (
            {"data": {"noise_kind": "near"}},
            "data.noise_kind: 'near' is not allowed; allowed: random, neighbours, partial, absent",
        ),
        (
            {"data": {"noise_kind": "partial"}},
            "data.noise_kind: 'partial' would change no caption: data.noise_rate is 0",
        ),
        (
            {"data": {"noise_kind": "absent"}},
            "data.noise_kind: 'absent' would change no caption: data.noise_rate is 0",
        ),
        (
            {"data": {"noise_kind": "absent", "noise_permutation": "o.npy"}},
            "data.noise_kind: 'absent' and data.noise_permutation 'o.npy' are both set",
        ),
        (
            {"data": {"noise_kind": "absent", "streaming": True, "noise_rate": 0.2}, "training": {"max_steps": 5}},
            "data.noise_rate: 0.2 needs all captions at once; set data.streaming to false",
        ),
        (
            {"data": {"noise_kind": "partial", "noise_permutation": "o.npy"}},
            "data.noise_kind: 'partial' and data.noise_permutation 'o.npy' are both set",
        ),
        (
            {"data": {"noise_kind": "neighbours", "noise_rate": 0.2}},
            "data.noise_kind: 'neighbours' needs stored features of the images; name a .npz file with",
        ),
        (
            {"data": {"noise_kind": "partial", "noise_rate": 0.2, "text_features": "t.npz"}},
            "data.noise_kind: 'partial' changes words, but data.text_features 't.npz' would stay",
        ),
        (
            {"data": {"streaming": True, "noise_rate": 0.2}, "training": {"max_steps": 5}},
            "data.noise_rate: 0.2 needs all captions at once; set data.streaming to false",
        ),
        (
            {"data": {"streaming": True, "noise_permutation": "o.npy"}, "training": {"max_steps": 5}},
            "data.noise_permutation: 'o.npy' needs all captions at once",
        ),
        (
            {"data": {"streaming": True, "image_features": "f.npz"}, "training": {"max_steps": 5}},
            "data.image_features: 'f.npz' needs rows in a fixed order",
        ),
        ({"data": {"streaming": True}}, "data.streaming: true needs training.max_steps"),
        (
            {"data": {"source": "webdataset", "path": "https://host/{0..9}.tar"}},
            "data.streaming: false, but the shards of 'https://host/{0..9}.tar' lie elsewhere",
        ),
        (
            {"selection": {"ratio": 0.1}},  # round(0.1 * 8) = 1 with the default batch of TrainingArguments
            "selection.ratio: 0.1 of training.per_device_train_batch_size 8 keeps k = round(ratio * batch) = 1 pairs, "
            "and a contrastive loss needs 2; allowed: a batch of at least 20, or a ratio of at least 0.25",
        ),
        (
            {"selection": {"warmup_epochs": 4}, "training": {"num_train_epochs": 4}},
            "selection.warmup_epochs: 4 leaves no epoch to select in; "
            "allowed: less than training.num_train_epochs (4)",
        ),
        (
            {"selection": {"warmup_epochs": 0}},
            "selection.warmup_epochs: 0 leaves no history to select by; allowed: at least 1",
        ),
        (
            {"selection": {"strategy": "random", "options": {"variant": "momentum"}}},
            "selection.options.variant: 'momentum' is not allowed: random takes no options; "
            "set selection.options to {}",
        ),
        (
            {"evaluation": {"zero_shot": {}}},
            "evaluation.zero_shot.classes: [] is not allowed; allowed: at least one class name",
        ),
        ({"evaluation": {"zero_shot": {"classes": ["a", "a"]}}}, "allowed: each class name once"),
        (
            {"objective": {"gsc": {"gama": 0.1}}},
            "objective.gsc.gama: unknown key (value 0.1); allowed: gamma, beta, temperature, warmup_epochs, dual, "
            "evidence; did you mean 'gamma'?",
        ),
        ({"objective": {"gsc": {"beta": 0}}}, "objective.gsc.beta: 0 is not allowed; allowed: a number in (0, 1]"),
        ({"objective": {"gsc": {"gamma": -0.1}}}, "objective.gsc.gamma: -0.1 is not allowed; allowed: at least 0"),
        (
            {"objective": {"gsc": {"temperature": 0}}},
            "objective.gsc.temperature: 0 is not allowed; allowed: more than 0",
        ),
        ({"objective": {"gsc": {"dual": 1}}}, "objective.gsc.dual: 1 is not allowed; allowed: true or false"),
        ({"objective": {"gsc": True}}, "objective.gsc: True is not allowed; allowed: a mapping of settings"),
        (
            {"objective": {"gsc": {"warmup_epochs": 3}}},
            "objective.gsc.warmup_epochs: 3 leaves no epoch with soft labels; "
            "allowed: less than training.num_train_epochs (3)",
        ),
        (
            {"objective": {"gsc": {}}, "selection": {"mask_false_negatives": True}},
            "objective.gsc: does not go with selection.mask_false_negatives",
        ),
        (
            {"objective": {"noisy_channel": {"pi": 0.3}}},
            "objective.noisy_channel.pi: unknown key (value 0.3); allowed: smoothing",
        ),
        (
            {"objective": {"noisy_channel": True}},
            "objective.noisy_channel: True is not allowed; allowed: a mapping of settings",
        ),
        (
            {"objective": {"noisy_channel": {}, "gsc": {}}},
            "objective.noisy_channel: does not go with gsc: each replaces the contrastive loss; "
            "set one of them to null",
        ),
        (
            {"objective": {"noisy_channel": {}}, "selection": {"strategy": "noisy_channel"}},
            "objective.noisy_channel: does not go with the strategy noisy_channel: both weight the pairs by the same",
        ),
        (
            {"selection": {"strategy": "noisy_channel", "options": {"power": 3}}},
            "selection.options.power: 3 is not allowed: noisy_channel takes no options; set selection.options to {}",
        ),
        ({"training": {"noisy_channel": {}}}, "training.noisy_channel: is set by objective.noisy_channel (value {})"),
        ({"training": {"gsc": {}}}, "training.gsc: is set by objective.gsc (value {}); write it there"),
        (
            {"selection": {"strategy": "gsc", "options": {"beta": 1.5}}},
            "selection.options.beta: 1.5 is not allowed; allowed: a number in (0, 1]",
        ),
        (
            {"selection": {"strategy": "ncr", "options": {"beta": 0.5}}},
            "selection.options.beta: unknown key (value 0.5); allowed for ncr: seed",
        ),
        (
            {"selection": {"strategy": "ncr", "warmup_epochs": 0}},
            "selection.warmup_epochs: 0 leaves no history to select by; allowed: at least 1",
        ),
        (
            {"evaluation": {"zero_shot": {"classes": ["a"], "templates": ["a photo"]}}},
            "evaluation.zero_shot.templates: 'a photo' is not allowed; allowed: text with {} for the class name",
        ),
        (
            {"evaluation": {"zero_shot": {"classes": ["a"], "templates": ["{} {b}"]}}},
            "evaluation.zero_shot.templates: '{} {b}' is not allowed",
        ),
        (
            {"evaluation": {"zero_shot": {"classes": ["a"], "path": "x"}}},
            "evaluation.zero_shot.source: missing; evaluation.zero_shot.path is 'x' and needs it",
        ),
        (
            {"data": {"source": "hub", "path": "x"}, "evaluation": {"zero_shot": {"classes": ["a"]}}},
            "evaluation.zero_shot.path: missing; only data.source scenes brings labelled images of its own, not hub",
        ),
        (
            {"evaluation": {"batch_size": 4}, "training": {"per_device_eval_batch_size": 4}},
            "evaluation.batch_size: 4 and training.per_device_eval_batch_size are both set",
        ),
        (
            {"data": {"validation_split": None, "test_split": None}},
            "evaluation.retrieval: true needs data.validation_split or data.test_split",
        ),
        (
            {"data": {"validation_split": None}, "training": {"eval_strategy": "epoch"}},
            "training.eval_strategy: 'epoch' needs data.validation_split",
        ),
        ({"training": {"bf16": True, "fp16": True}}, "training.fp16: true is not allowed together with training.bf16"),
        (
            {"training": {"hub_token": "hf_x"}},
            "training.hub_token: a recipe is saved with the run and must hold no secret",
        ),
        (
            {"training": {"selection_ratio": 0.3}},
            "training.selection_ratio: is set by selection.ratio (value 0.3); write it there",
        ),
        ({"training": {"record_selection": True}}, "training.record_selection: is set by selection.record"),
        ({"training": {"dataloader_num_workers": 2}}, "training.dataloader_num_workers: is set by data.num_workers"),
        ({"training": {"caption_column": "t"}}, "training.caption_column: is set by data.caption_column"),
        ({"compare": {"strategies": []}}, "compare.strategies: [] is not allowed; allowed: at least one of dissect, "),
        (
            {"compare": {"strategies": ["none", "luck"]}},
            "compare.strategies: 'luck' is not a strategy; "
            "allowed: dissect, random, small_loss, big_loss, clipscore, ncr, gsc, "
            "info_batch, scan, divbs, forgetting, noisy_channel, learnability, rho, jest, coreset, none, "
            "dissect:warmup, dissect:momentum",
        ),
        ({"compare": {"strategies": ["random:momentum"]}}, "compare.strategies: 'random:momentum' is not a strategy"),
        ({"compare": {"strategies": ["dissect", "dissect:warmup"]}}, "'dissect:warmup' is there twice"),
        (
            {"compare": {"seeds": [1, 1]}},
            "compare.seeds: [1, 1] is not allowed; allowed: at least one, each seed once",
        ),
    ],
)
def test_a_fault_names_key_value_and_what_is_allowed(sections, fault):
    faults = faults_of(minimal(**sections))
    assert len(faults) == 1, faults
    assert fault in faults[0]


def test_all_faults_are_reported_together_and_none_twice():
    settings = minimal(
        selection={"ratoi": 0.001, "strategy": 3},
        data={"noise_rate": 2, "noise_permutation": "o.npy"},
        training={"per_device_train_batch_size": "many"},
    )
    keys = [fault.split(":")[0] for fault in faults_of(settings)]
    assert sorted(keys) == [
        "data.noise_rate",
        "selection.ratoi",
        "selection.strategy",
        "training.per_device_train_batch_size",
    ]
    with pytest.raises(RecipeError, match="here.yaml: 4 faults\n  "):
        Recipe.from_dict(settings, "here.yaml")


@pytest.mark.parametrize(
    "sections",
    [
        {"selection": {"ratio": 1}},  # an integer is a number
        {"selection": {"ratio": 0.01, "strategy": "none"}},  # nothing is selected, so the ratio is without effect
        {"selection": {"warmup_epochs": 9}, "training": {"max_steps": 5}},  # the epochs do not end the run
        {"selection": {"warmup_epochs": 9, "options": {"variant": "momentum"}}},
        {"selection": {"warmup_epochs": 9, "strategy": "random"}},
        {"data": None, "selection": None, "training": None},  # sections whose lines are all commented out
        {"data": {"source": "webdataset", "path": "x", "streaming": True}, "training": {"max_steps": 5}},
        {"evaluation": {"zero_shot": {"classes": ["cat"]}}},
        {"training": {"warmup_steps": 0.1, "eval_steps": 3, "fsdp_config": {"a": 1}, "report_to": ["wandb"]}},
        {"training": {"optim": "sgd", "lr_scheduler_kwargs": {"num_cycles": 1}, "debug": "", "data_seed": None}},
    ],
)
def test_sound_settings_are_accepted(sections):
    Recipe.from_dict(minimal(**sections))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; a recipe needs at least a name and a model"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "holds ['a', 'b'] (a list); a recipe is a mapping of sections"),
        ("just text", "holds 'just text' (a str)"),
        ("name: a\nmodel: {config: [}\n", "line 2, column 18: while parsing a flow node, "),
        ("name: a\n\tmodel: b\n", "line 2, column 1: "),
        ("name: a\ndata:\n  path: x\n  path: y\n", "line 4, column 3: key 'path' appears twice"),
        ("name: a\nname: b\n", "line 2, column 1: key 'name' appears twice"),
        ("name: &x a\ndescription: *x\n", "line 1, column 7: anchors and aliases are not supported ('x')"),
        ("name: !!python/object/apply:os.getcwd []\n", "line 1, column 7: could not determine a constructor"),
        ("name: !!binary aGk=\n", "line 1, column 7: could not determine a constructor"),
        ("name: !!int abc\n", "line 1, column 7: cannot be read as int"),
        ("name: !!map abc\n", "line 1, column 7: expected a mapping node"),
        ("name: " + "9" * 5000 + "\n", "line 1, column 7: cannot be read as int"),
        ("? [a, b]\n: 1\n", "line 1, column 3: a key must be text"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: expected a single document"),
        ("x: " + "[" * 5000, "nested too deeply"),
        ("name: a\nx: \x00\n", "line 2: the character '\\x00' is not allowed in YAML"),
        (b"PAR1\n\xff\xfe\x00", "line 2: not UTF-8 text; a recipe is a YAML file"),
        (b"a" * 1_000_001, "is larger than 1000000 bytes"),
    ],
)
def test_unreadable_yaml_says_where(tmp_path, content, message):
    assert message in load_error(tmp_path / "recipe.yaml", content)


def test_a_missing_file_and_a_folder_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="quickstrat: no such file; shipped recipes: .*did you mean quickstart?"):
        Recipe.load("quickstrat")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load("x" * 300 + ".yml")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load("a\0b.yml")
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    with pytest.raises(RecipeError, match="runs: is a folder; a recipe is a YAML file"):
        Recipe.load("runs")
    Recipe.from_dict(minimal()).save(run / "recipe.yaml")
    with pytest.raises(RecipeError, match="is a folder; did you mean .*one/recipe.yaml?"):
        Recipe.load(run)


def test_scalars_are_read_without_the_surprises_of_yaml_1_1(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: no\nmodel:\n  config: {model_type: clip, a: 1e-3, b: 010, c: 1:30, d: 2024-01-01, e: -.5E+2, f: 1_000, "
        "g: ~, h: 1., i: -7, j: on, k: '1e-3', l: 1e5}\n"
    )
    assert Recipe.load(path).name == "no"
    assert list(Recipe.load(path).model.config.values())[1:] == [
        *[0.001, "010", "1:30", "2024-01-01", -50.0, 1000, None, 1.0, -7, "on", "1e-3", 100000.0]
    ]
    path.write_bytes(b"\xef\xbb\xbfname: with-mark\r\nmodel: {name_or_path: x}\r\n")
    assert Recipe.load(path).name == "with-mark"


def test_overrides_reach_every_depth():
    recipe = Recipe.load(
        "quickstart",
        [
            "name=other",
            "training.learning_rate=1e-3",
            "selection.options.variant=momentum",
            "selection.options.momentum=0.5",
            "model.config.vision_config.hidden_size=64",
            "evaluation.zero_shot=null",
            "data.max_train_rows=1_000",
            "compare.seeds=[1, 2]",
            "training.run_name=a=b",
            "training.eval_strategy=no",
        ],
    )
    assert recipe.name == "other" and recipe.training["learning_rate"] == 0.001
    assert isinstance(recipe.training["learning_rate"], float)
    assert recipe.selection.options == {"warmup_on": "all", "variant": "momentum", "momentum": 0.5}
    assert recipe.model.config["vision_config"]["hidden_size"] == 64
    assert recipe.evaluation.zero_shot is None and recipe.data.max_train_rows == 1000
    assert recipe.compare.seeds == [1, 2] and recipe.training["run_name"] == "a=b"
    assert recipe.training["eval_strategy"] == "no"
    made = Recipe.from_dict(minimal()).with_overrides(["evaluation.zero_shot.classes=[cat, dog]"])
    assert made.evaluation.zero_shot == ZeroShotSection(["cat", "dog"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selection.ratio", "'selection.ratio' is not an override; allowed: section.key=value"),
        ("=3", "'=3' is not an override"),
        ("selection..ratio=1", "is not an override"),
        ("selection.ratio.=1", "is not an override"),
        ("selection.ratio=[", "selection.ratio: '[' is not a YAML value (line 1, column 2: "),
        ("selection.ratio=nan", "selection.ratio: 'nan' is not allowed; allowed: a number"),
        ("selection.ratio=1e999", "selection.ratio: inf is not allowed; allowed: a finite number"),
        ("selection.ratio.x=1", "selection.ratio.x: selection.ratio is 0.5, not a mapping; give it as a whole"),
        (
            "compare.seeds.0=1",
            "compare.seeds.0: compare.seeds is [0], not a mapping; give it as a whole: compare.seeds=...",
        ),
        ("selction.ratio=1", "selction: unknown key (value {'ratio': 1}); allowed: name, "),
        ("selection.ratoi=1", "selection.ratoi: unknown key (value 1); allowed: strategy, ratio, "),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(minimal()).with_overrides([override])
    assert message in str(caught.value) and str(caught.value).startswith("recipe small: ")


def test_overrides_leave_the_recipe_itself_alone():
    recipe = Recipe.from_dict(minimal())
    before = copy.deepcopy(recipe)
    changed = recipe.with_overrides(["model.config.x=1", "selection.options.momentum=0.1", "training.seed=5"])
    assert recipe == before and changed != before
    settings = minimal()
    Recipe.from_dict(settings).model.config["x"] = 1
    assert settings == minimal()


def test_with_strategy_takes_the_named_variant_and_no_foreign_options():
    recipe = Recipe.from_dict(minimal(selection={"options": {"variant": "momentum", "momentum": 0.5}}))
    random = recipe.with_strategy("random").selection
    assert (random.strategy, random.options) == ("random", {})
    assert recipe.with_strategy("dissect").selection.options == {"variant": "warmup", "momentum": 0.5}
    from_random = recipe.with_strategy("random").with_strategy("dissect:momentum").selection
    assert (from_random.strategy, from_random.options) == ("dissect", {"variant": "momentum"})
    with pytest.raises(RecipeError, match="recipe small: 'luck' is not a strategy; allowed: dissect, random"):
        recipe.with_strategy("luck")
    short = recipe.with_overrides(["training.num_train_epochs=1"])
    with pytest.raises(RecipeError, match="recipe small with dissect: selection.warmup_epochs: 1 leaves no epoch"):
        short.with_strategy("dissect")


def test_parse_strategy():
    assert parse_strategy("dissect") == ("dissect", "warmup")
    assert parse_strategy("dissect:momentum") == ("dissect", "momentum")
    assert parse_strategy("none") == ("none", None)
    for wrong in ("", "dissect:", "random:", ":warmup", "Dissect"):
        with pytest.raises(ValueError, match="is not a strategy; allowed: dissect, "):
            parse_strategy(wrong)


def test_save_writes_everything_and_loads_back_equal(tmp_path):
    settings = minimal(
        description="yes: a 'line' # with — everything",
        model={"config": {"model_type": "clip", "a": "1e-3", "b": "no", "c": 1e-07, "d": "010", "e": "", "f": "null"}},
        data={"source": "folder", "path": "2024-01-01", "caption_column": "1.", "train_split": "~"},
        evaluation={
            "zero_shot": {"classes": ["yes", "ünï", "1_0", "{}"], "templates": ["{}"], "source": "hub", "path": "x"}
        },
        training={"learning_rate": 1e-05, "eval_strategy": "no", "num_train_epochs": 3, "fsdp_config": {}},
        compare={"strategies": ["dissect:momentum"], "seeds": [7]},
    )
    recipe, path = Recipe.from_dict(settings), tmp_path / "recipe.yaml"
    recipe.save(path)
    assert Recipe.load(path) == recipe
    first, *_ = text = path.read_text("utf-8").splitlines()
    assert first == f"# All settings of a run, defaults included. Repeat it with: hf-dissect train {path}"
    assert [line.split(":")[0] for line in text[1:] if line[0].isalpha()] == [
        *["name", "description", "model", "adapter", "data", "selection", "objective", "evaluation"],
        *["training", "compare"],
    ]
    # Any other YAML reader sees the same text and every default.
    assert yaml.safe_load(path.read_text("utf-8")) == recipe.to_dict()
    assert recipe.to_dict()["selection"]["max_bad_fraction"] == 0.01
    again = tmp_path / "again.yaml"
    Recipe.load(path).save(again)
    assert again.read_text("utf-8").splitlines()[1:] == text[1:]


def test_training_arguments_gather_the_sections():
    recipe = Recipe.from_dict(
        minimal(
            model={"name_or_path": "x", "max_caption_length": 20},
            data={"source": "folder", "path": "p", "image_features": "f.npz", "id_column": "key", "num_workers": 2}
            | {"shuffle_buffer": 100},
            selection={"ratio": 0.3, "record": True, "options": {"variant": "momentum"}, "mask_false_negatives": True}
            | {"scope": "global"},
            objective={"grad_cache_chunk_size": 16, "gsc": None, "noisy_channel": None, "rince": None},
            evaluation={"batch_size": 64},
            training={"seed": 3, "learning_rate": 0.01},
        )
    )
    assert recipe.training_arguments() == {
        "seed": 3,
        "check_reload": True,
        "learning_rate": 0.01,
        "output_dir": "runs/small",
        "selection_strategy": "dissect",
        "selection_ratio": 0.3,
        "max_train_pairs": 10_000,
        "selection_scope": "global",
        "selection_warmup_epochs": 1,
        "selection_options": {"variant": "momentum"},
        "initial_ledger": None,
        "mask_false_negatives": True,
        "grad_cache_chunk_size": 16,
        "gsc": None,
        "noisy_channel": None,
        "selection_reference": None,
        "selection_rescore_every": 1,
        "shard_ledger": True,
        "scoring_dtype": None,
        "scoring_image_size": None,
        "scoring_patch_dropout": 0.0,
        "scoring_exposure": None,
        "image_size": None,
        "patch_dropout": 0.0,
        "rince": None,
        "symnce": None,
        "division": None,
        "repair": None,
        "weight_column": None,
        "balance_column": None,
        "balance_strength": 0.5,
        "balance_max_visits": 8,
        "sampling_file": None,
        "selection_usage_penalty": 0.0,
        "scoring_batch_size": None,
        "record_selection": True,
        "max_bad_fraction": 0.01,
        "image_column": "image_features",
        "caption_column": None,
        "id_column": "key",
        "task_column": None,
        "clean_column": None,
        "max_caption_length": 20,
        "caption_lengths": None,
        "fast_decoding": False,
        "shuffle_buffer": 100,
        "dataloader_num_workers": 2,
        "run_name": "small",
        "per_device_eval_batch_size": 64,
    }
    named = recipe.with_overrides(
        ["data.image_column=pixels", "training.output_dir=elsewhere/y", "evaluation.batch_size=null"]
    )
    arguments = named.training_arguments()
    assert (arguments["image_column"], arguments["output_dir"]) == ("pixels", "elsewhere/y")
    assert "per_device_eval_batch_size" not in arguments
    arguments["selection_options"]["variant"] = "changed"
    assert named.selection.options == {"variant": "momentum"}


def test_soft_labels_have_the_same_defaults_in_a_recipe_and_in_python():
    recipe = Recipe.from_dict(minimal(objective={"gsc": {}}))
    assert recipe.objective.gsc == GscSection()
    assert recipe.training_arguments()["gsc"] == DissectTrainingArguments("unused", gsc={}).gsc
    changed = Recipe.from_dict(minimal()).with_overrides(["objective.gsc.beta=0.5"])
    assert changed.objective.gsc == GscSection(beta=0.5)
    assert changed.with_overrides(["objective.gsc=null"]).objective.gsc is None


def test_an_objective_with_its_defaults_survives_a_round_trip(tmp_path):
    recipe = Recipe.from_dict(minimal()).with_overrides(["objective.noisy_channel={}"])
    assert recipe.objective.noisy_channel == NoisyChannelSection()
    recipe.save(tmp_path / "recipe.yaml")
    loaded = Recipe.load(tmp_path / "recipe.yaml")
    assert loaded == recipe and loaded.training_arguments()["noisy_channel"] == {"smoothing": 0.0}
    assert select_shareable(loaded.to_dict())[0]["objective"]["noisy_channel"] == {"smoothing": 0.0}
    assert loaded.with_overrides(["objective.noisy_channel=null"]).objective.noisy_channel is None


def test_every_option_that_a_recipe_allows_is_one_of_the_strategy():
    for strategy, options in {
        "dissect": {"variant": "momentum", "momentum": 0.5, "warmup_on": "all"},
        "gsc": {"beta": 0.5, "temperature": 0.1, "seed": 3},
        "ncr": {"seed": 3},
    }.items():
        recipe = Recipe.from_dict(minimal(selection={"strategy": strategy, "options": options}))
        made = DissectTrainingArguments(**recipe.training_arguments()).make_strategy()
        assert made.name == strategy


def test_shipped_names_and_a_file_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = Recipe.load("quickstart")
    assert Recipe.load("recipes/quickstart.yaml") == by_name == Recipe.load(Path("quickstart.yaml"))
    (tmp_path / "recipes").mkdir()
    by_name.with_overrides(["name=mine"]).save("recipes/quickstart.yaml")
    assert Recipe.load("recipes/quickstart.yaml").name == "mine" and Recipe.load("quickstart") == by_name
    with pytest.raises(RecipeError, match="no such file"):
        Recipe.load("elsewhere/quickstart.yaml")


def test_all_recipes_are_shipped():
    assert sorted(shipped_recipes()) == sorted(SHIPPED + DISTILLATION)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_is_sound(name, tmp_path):
    from hf_dissect.training_args import DissectTrainingArguments

    recipe = Recipe.load(name)
    assert recipe.name == name
    assert read_description(shipped_recipes()[name]) == recipe.description != ""
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    known = {field.name for field in dataclasses.fields(DissectTrainingArguments)}
    for spec in recipe.compare.strategies:
        assert set(recipe.with_strategy(spec).training_arguments()) <= known
    local = recipe.with_overrides([f"training.output_dir={tmp_path}", "training.bf16=false"])
    arguments = DissectTrainingArguments(**local.training_arguments())
    assert arguments.selection_ratio == recipe.selection.ratio == 0.5


@pytest.mark.parametrize("name", [name for name in SHIPPED if Recipe.load(name).model.config is not None])
def test_shipped_model_can_be_built(name):
    import torch
    from transformers import AutoConfig, AutoModel

    import hf_dissect.models.feature_encoder  # noqa: F401 (registers the vision tower of stored features)

    settings = Recipe.load(name).model.config
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert model.config.projection_dim == settings["projection_dim"]
    assert hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    assert set(settings["vision_config"]) <= set(model.config.vision_config.to_dict())
    assert set(settings["text_config"]) <= set(model.config.text_config.to_dict())


def test_quickstart_classifies_the_classes_of_the_scenes():
    from hf_dissect.data.scenes.grammar import SCENE_CLASSES, SCENE_TEMPLATES

    zero_shot = Recipe.load("quickstart").evaluation.zero_shot
    assert zero_shot.classes == list(SCENE_CLASSES) and set(zero_shot.templates) <= set(SCENE_TEMPLATES)


def test_published_steps_of_the_paper():
    for name, pairs, epochs in (("cc3m", 2_905_954, 40), ("cc12m", 12_423_374, 20), ("yfcc15m", 14_681_591, 20)):
        recipe = Recipe.load(name)
        assert recipe.training["max_steps"] == pairs // (8 * 1280) * epochs
        assert recipe.selection.warmup_epochs == 10 and recipe.data.streaming
        wanted = {"per_device_train_batch_size": 1280, "learning_rate": 2e-3, "weight_decay": 0.1}
        assert wanted.items() <= recipe.training.items() and recipe.training["lr_scheduler_type"] == "cosine"


def test_the_schema_says_what_the_code_it_describes_says():
    from hf_dissect.data import loading
    from hf_dissect.selection import SCOPES as RULE_SCOPES
    from hf_dissect.selection import STRATEGIES as RULES
    from hf_dissect.selection.options import OPTIONS, DissectOptions

    assert list(STRATEGIES) == list(OPTIONS) == list(RULES)
    assert STRATEGIES["dissect"] == ("warmup", "momentum") and DissectOptions().variant == STRATEGIES["dissect"][0]
    for name, options in OPTIONS.items():
        assert set(list_settings(options)) <= set(inspect.signature(RULES[name]).parameters)
    assert SCOPES == RULE_SCOPES and SOURCES == loading.SOURCES
    defaults = {name: item.default for name, item in inspect.signature(loading.load_splits).parameters.items()}
    assert defaults == dataclasses.asdict(DataSection())


def test_importing_the_recipe_loads_nothing_heavy():
    code = (
        "import sys; from hf_dissect.recipe.file import read_description, shipped_recipes; "
        "texts = [read_description(path) for path in shipped_recipes().values()]; "
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else len(texts))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == len(SHIPPED + DISTILLATION), done.stderr
