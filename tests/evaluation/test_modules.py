"""The three `evaluate` modules, loaded as users load them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_dissect.evaluation
from hf_dissect.evaluation import (
    MODULE_NAMES,
    load,
    noise_detection_metrics,
    retrieval_from_pairs,
    zero_shot_metrics,
)

FOLDER = Path(hf_dissect.evaluation.__file__).parent

OFFLINE_SCRIPT = """
import json, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("went to the network")
socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
from hf_dissect.evaluation import load
embeds = [[1.0, 0.0], [0.0, 1.0]]
calls = {
    "retrieval": dict(image_embeds=embeds, text_embeds=embeds, image_ids=["a", "b"]),
    "zero_shot": dict(image_embeds=embeds, labels=[0, 1], class_embeds=embeds),
    "noise_detection": dict(scores=[0.9, 0.1], is_clean=[True, False]),
}
found = {}
for name, inputs in calls.items():
    for module in (evaluate.load(f"{sys.argv[1]}/{name}"), load(name)):
        found.setdefault(name, []).append([module.name, module.module_type, module.compute(**inputs)])
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what `evaluate` writes out of the user's home."""
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")


def test_all_load_offline_by_folder_and_by_name_from_any_place(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = str(FOLDER.parents[1])
    script = [sys.executable, "-c", OFFLINE_SCRIPT, str(FOLDER)]
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == list(MODULE_NAMES)
    for name, ((own_name, kind, by_folder), (_, _, by_name)) in found.items():
        assert (own_name, kind) == (name, "metric")
        assert by_folder == by_name
    assert found["retrieval"][0][2]["recall_sum"] == pytest.approx(600)
    assert found["zero_shot"][0][2]["accuracy@1"] == 1
    assert found["noise_detection"][0][2]["auroc"] == 1


@pytest.mark.parametrize("name", MODULE_NAMES)
def test_card_fields_are_filled_in(name: str) -> None:
    module = load(name)
    assert module.citation.startswith("@inproceedings{")
    assert len(module.description) > 100
    assert "Args:" in module.inputs_description and "Returns:" in module.inputs_description
    assert module.info.reference_urls


def test_example_in_each_description_is_true() -> None:
    import doctest

    for name in MODULE_NAMES:
        test = doctest.DocTestParser().get_doctest(load(name).inputs_description, {}, name, None, None)
        assert test.examples
        assert doctest.DocTestRunner().run(test).failed == 0


def test_retrieval_in_batches_gives_the_figures_of_the_function() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(10, 6)).astype(np.float32)[np.arange(30) % 10]
    texts = images + rng.normal(size=(30, 6)).astype(np.float32)
    for keys in (np.arange(30) % 10, [f"{i % 10}.jpg" for i in range(30)]):
        retrieval = load("retrieval")
        for rows in (slice(0, 13), slice(13, 30)):
            retrieval.add_batch(
                image_embeds=torch.from_numpy(images[rows]), text_embeds=texts[rows], image_ids=keys[rows]
            )
        assert retrieval.compute(block_size=7) == pytest.approx(retrieval_from_pairs(images, texts, keys))


def test_retrieval_with_ids_of_captions_counts_equal_ones_as_right() -> None:
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 30, 6)).astype(np.float32)
    captions = [f"a photo of class {index % 7}" for index in range(30)]
    texts = texts[np.arange(30) % 7]
    for ids, keys in ((np.arange(30), captions), ([str(i) for i in range(30)], np.arange(30) % 7)):
        expected = retrieval_from_pairs(images, texts, ids, keys)
        given = {"image_embeds": images, "text_embeds": texts, "image_ids": ids}
        assert load("retrieval").compute(**given, text_ids=keys) == pytest.approx(expected)
        retrieval = load("retrieval", keep_in_memory=True)
        for rows in (slice(0, 11), slice(11, 30)):
            part = {name: values[rows] for name, values in given.items()}
            retrieval.add_batch(**part, text_ids=keys[rows])
        assert retrieval.compute() == pytest.approx(expected)
        assert expected["repeated_captions"] == 30 and expected["image_to_text_own_ceiling@1"] < 30
    assert "repeated_captions" not in load("retrieval").compute(**given)
    retrieval = load("retrieval", keep_in_memory=True)
    with pytest.raises(ValueError, match="text_ids.: 3"):
        retrieval.add_batch(**given, text_ids=[1, 2, 3])
    retrieval.add_batch(**given, text_ids=keys)
    retrieval.add_batch(**given)
    with pytest.raises(ValueError, match="text_ids are missing for 30 of 60 pairs"):
        retrieval.compute()


def test_zero_shot_and_noise_detection_give_the_figures_of_the_functions() -> None:
    rng = np.random.default_rng(1)
    images, classes, labels = rng.normal(size=(20, 4)), rng.normal(size=(6, 4)), np.arange(20) % 6
    images = images.astype(np.float32)
    found = load("zero_shot").compute(image_embeds=images, labels=labels, class_embeds=classes, top_k=(1, 2))
    assert found == pytest.approx(zero_shot_metrics(images, classes, labels, (1, 2)))

    scores, is_clean = [*rng.normal(size=19), math.nan], rng.random(20) > 0.4
    found = load("noise_detection", keep_in_memory=True).compute(scores=scores, is_clean=is_clean, shares=(0.2,))
    assert found == pytest.approx(noise_detection_metrics(scores, is_clean, (0.2,)))
    assert found["num_unscored"] == 1


def test_an_error_names_the_column_and_leaves_the_module_usable() -> None:
    retrieval = load("retrieval")
    with pytest.raises(ValueError, match="Missing image_ids"):
        retrieval.compute(image_embeds=np.eye(2), text_embeds=np.eye(2))
    with pytest.raises(ValueError, match="differ in length.*'text_embeds': 3"):
        retrieval.compute(image_embeds=np.eye(2), text_embeds=np.eye(3), image_ids=[0, 1])
    with pytest.raises(ValueError, match="NaN"):
        retrieval.compute(image_embeds=np.full((2, 2), np.nan), text_embeds=np.eye(2), image_ids=[0, 1])
    found = retrieval.compute(image_embeds=np.eye(2), text_embeds=np.eye(2), image_ids=[0, 1])
    assert found["recall_sum"] == pytest.approx(600)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'accuracy'.*retrieval, zero_shot, noise_detection"):
        load("accuracy")
