"""The card must stay readable for the Hub (YAML) and must not carry local paths or foreign markup."""

import ast
import getpass
import re

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from hf_dissect.cards.privacy import hub_dataset, may_be_published
from hf_dissect.hub.published_files import name_model
from hf_dissect.model_card import ModelFacts, write_model_card
from hf_dissect.recipe.recipe import Recipe

METRICS = {
    "name": "quick",
    "strategy": "dissect",
    "seed": 3,
    "steps": 120,
    "num_pairs": 4096,
    "final": {"retrieval_r@1_image_to_text": 12.5, "recall_sum": 101.0},
    "selection": {"noise_kept": 0.25},
    "times": {"total_s": 100.0, "scoring_s": 25.0},
    "settings": {
        "selection_ratio": 0.5,
        "selection_options": {"variant": "momentum"},
        "data_path": "/home/me/data",
    },
}


def card(tmp_path, **arguments):
    path = write_model_card(tmp_path / "README.md", **{"metrics": METRICS, **arguments})
    assert path == tmp_path / "README.md"
    text = path.read_text("utf-8")
    metadata = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1]
    return yaml.safe_load(metadata), text


def recipe(name="clip-finetune", **sections):
    model = {"name_or_path": "openai/clip-vit-base-patch32"}
    return Recipe.from_dict({"name": name, "model": model} | sections)


def snippet(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_metadata(tmp_path):
    data = {"source": "hub", "path": "jxie/flickr8k", "name": "raw", "noise_rate": 0.4, "noise_seed": 7}
    zero_shot = {"source": "hub", "path": "me/pets", "classes": ["cat", "dog"], "split": "validation"}
    metrics = METRICS | {"final": METRICS["final"] | {"zero_shot_accuracy@1": 0.5, "noise_detection_auroc": 0.9}}
    metadata, text = card(
        tmp_path,
        metrics=metrics,
        base_model="openai/clip-vit-base-patch32",
        recipe=recipe(data=data, evaluation={"zero_shot": zero_shot}),
    )
    assert metadata["library_name"] == "transformers" and metadata["base_model"] == "openai/clip-vit-base-patch32"
    assert {"clip", "dissect", "image-text-retrieval"} <= set(metadata["tags"])
    assert metadata["datasets"] == ["jxie/flickr8k"] and "license" not in metadata
    assert metadata["pipeline_tag"] == "zero-shot-image-classification"
    assert "# clip-finetune" in text and "https://huggingface.co/datasets/jxie/flickr8k" in text
    for row in (
        "| Data | jxie/flickr8k |",
        "| Configuration | raw |",
        "| Injected noise | 40% of the training captions shuffled, seed 7 |",
        "| Training pairs | 4,096 |",
    ):
        assert row in text
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    found = {r.metric_type: (r.task_type, r.dataset_type, r.dataset_split, r.metric_value) for r in results}
    assert found == {
        "retrieval_r@1_image_to_text": ("image-text-retrieval", "jxie/flickr8k", "test", 12.5),
        "recall_sum": ("image-text-retrieval", "jxie/flickr8k", "test", 101.0),
        "zero_shot_accuracy@1": ("zero-shot-image-classification", "me/pets", "validation", 0.5),
    }
    assert {r.dataset_config for r in results if r.dataset_type == "jxie/flickr8k"} == {"raw"}


def test_figures_of_the_validation_split_are_told_as_such(tmp_path):
    data = {"source": "hub", "path": "me/pairs", "validation_split": "dev", "test_split": None}
    _, text = card(tmp_path, recipe=recipe(data=data), evaluated="validation", progress="step 3 of 9")
    assert {r.dataset_split for r in ModelCard.load(tmp_path / "README.md").data.eval_results} == {"dev"}
    assert "of the validation split" in text and "this is step 3 of 9" in text


def test_what_the_user_tells_stands_in_the_metadata(tmp_path):
    told = {"license": "mit", "language": "en", "tags": ["clip", "mine"], "datasets": "me/more"}
    metadata, _ = card(tmp_path, recipe=recipe(data={"source": "hub", "path": "me/pairs"}), given=told)
    assert (metadata["license"], metadata["language"]) == ("mit", "en")
    assert metadata["datasets"] == ["me/pairs", "me/more"]
    assert metadata["tags"].count("clip") == 1 and "mine" in metadata["tags"]


def test_body_says_selection_cost_results_and_citation(tmp_path):
    _, text = card(tmp_path)
    for row in (
        "| Selection: strategy | dissect |",
        "| Selection: ratio | 0.5 |",
        '| Selection: options | {"variant": "momentum"} |',
        "| Wall-clock | 100.0 s |",
        "| Time for scoring | 25.0 % |",
        "| Mismatched among the kept pairs | 25.0 % |",
        "| Image→text R@1 | 12.50 |",
        "| Recall sum | 101 |",
    ):
        assert row in text
    assert "2507.12998" in text and "trained from scratch" in text


@pytest.mark.parametrize("name", ["/home/me/model", "./model", "../model", "C:\\model", "a/b/c", "~/model"])
def test_a_local_base_model_is_not_named(tmp_path, name):
    metadata, text = card(tmp_path, base_model=name)
    assert "base_model" not in metadata and name not in text and "/home/me" not in text
    assert "started from a local model" in text


def test_a_local_folder_that_looks_like_an_id_is_not_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    metadata, text = card(tmp_path, base_model="runs/x")
    assert "base_model" not in metadata and "runs/x" not in text


def test_snippet_is_python_and_names_the_model(tmp_path):
    _, text = card(tmp_path, model_id="me/quick")
    code = snippet(text)
    ast.parse(code)
    assert 'model_id = "me/quick"' in code and code.count("from_pretrained(model_id)") == 2


def test_the_model_can_be_named_afterwards(tmp_path):
    _, text = card(tmp_path, recipe=recipe(description='model_id = "x"'))
    named = name_model(text, "me/quick")
    assert 'model_id = "me/quick"' in snippet(named)
    assert named.replace('model_id = "me/quick"', 'model_id = "."') == text


@pytest.mark.parametrize(
    ("model", "there", "missing"),
    [
        (ModelFacts("siglip", "sigmoid", "max_length"), ("logits.sigmoid()", 'padding="max_length"'), "softmax"),
        (
            ModelFacts(feature_size=12),
            ("torch.randn(1, 12)", "import hf_dissect  # makes the model's type known"),
            "PIL",
        ),
    ],
)
def test_snippet_suits_the_model(tmp_path, model, there, missing):
    _, text = card(tmp_path, model=model)
    ast.parse(snippet(text))
    assert all(part in snippet(text) for part in there) and missing not in snippet(text)


HOSTILE = "<script>alert(1)</script>\n---\nlicense: mit\n# z | [x](x) `y` &lt;b&gt;"


def test_markup_in_names_stays_text(tmp_path):
    data = {"source": "hub", "path": "me/pairs", "task_column": HOSTILE, "train_split": HOSTILE, "name": HOSTILE}
    hostile = recipe(data=data)
    hostile.name = hostile.description = HOSTILE  # which no recipe that was read can have
    metrics = METRICS | {
        "final": {"a|b<script>": 1.0, f"r@1 {HOSTILE}": 2.0},
        "strategy": HOSTILE,
        "settings": {HOSTILE: 1, "optim": HOSTILE, "lr_scheduler_kwargs": {"x": "<b>"}},
        "versions": {"python": "<i>"},
        "adapter": {"type": "lora", "settings": {"<u>": "<s>"}},
    }
    arguments = {"picture": "report.png", "picture_text": "](x) <script>", "progress": "<em>"}
    metadata, text = card(tmp_path, metrics=metrics, recipe=hostile, **arguments)
    assert "license" not in metadata and metadata == metadata_load(tmp_path / "README.md")
    body = text.split("\n---\n", 1)[1]
    assert not re.search(r"<(script|/script|b|i|u|s|em)>", body) and "\n# z" not in body and "\nlicense" not in body
    assert "](x)" not in body and "| A&#124;b&#60;script&#62; | 1 |" in body and "&#38;lt;b&#38;gt;" in body
    assert "--- license: mit" in body.split("\n")[1]  # the title, on its one line


SECRETS = ["/home/me/data", "~/x", "../x", "./x", "C:\\data", "file:/x", "https://me:pw@host/x", "hf_abcdefghijklmnop"]


@pytest.mark.parametrize("secret", SECRETS)
def test_no_place_and_no_token_is_published(tmp_path, secret):
    local = {"source": "folder", "path": secret, "image_features": secret, "noise_permutation": secret}
    own = recipe(description=f"Trained on ({secret}).", data=local)
    own.name = secret
    metrics = METRICS | {
        "name": secret,
        "settings": {"optim": secret, "lr_scheduler_kwargs": {"file": [secret]}, "deepspeed": secret},
        "final": {f"r@1 {secret}": 1.0},
        "adapter": {"type": "xlora", "settings": {"adapters": {"a": secret}}},
    }
    metadata, text = card(tmp_path, metrics=metrics, base_model=secret, recipe=own)
    assert secret not in text and "CLIP trained with hf_dissect" in text
    assert "datasets" not in metadata and "base_model" not in metadata
    assert "| Data | Local image-text pairs |" in text and "fixed permutation" in text


def test_neither_this_folder_nor_this_user_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    _, text = card(tmp_path, recipe=recipe(data={"source": "hub", "path": "data/mine"}), base_model="data/mine")
    assert "data/mine" not in text and str(tmp_path) not in text
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text)


def test_patterns_and_plain_words_may_be_published():
    for value in (".*vision_model.*(q_proj|fc1)", ["q_proj"], {"r": 4}, "image/text pairs, 1/2 noisy", "a.b", 1.5):
        assert may_be_published(value)


def test_ids_of_data_on_the_hub():
    assert hub_dataset("hub", "me/pairs") == "me/pairs" and hub_dataset("folder", "me/pairs") is None
    assert hub_dataset("webdataset", "hf://datasets/me/shards/train-{000..123}.tar") == "me/shards"
    assert hub_dataset("webdataset", "https://host/train.tar") is None and hub_dataset("scenes", None) is None


@pytest.mark.parametrize(
    ("metrics", "model_type", "papers"),
    [
        ({"strategy": "dissect"}, "clip", {"2507.12998", "2103.00020"}),
        ({"strategy": "none", "settings": {"gsc": {"gamma": 0.01}}}, "siglip", {"2405.16996", "2303.15343"}),
        ({"strategy": "none", "settings": {"noisy_channel": {}}}, "siglip", {"2303.15343"}),
        ({"strategy": "gsc", "settings": {"gsc": {}}}, "clip", {"2405.16996", "2103.00020"}),
        ({"strategy": "ncr", "settings": {"division": {}}}, "siglip", {"2303.15343"}),
        ({"strategy": "random", "adapter": {"type": "mola"}}, "align", {"2406.09679", "2102.05918"}),
        ({"strategy": "small_loss", "adapter": {"type": "lora"}}, "siglip2",
         {"1804.06872", "2106.09685", "2502.14786"}),
        ({"strategy": "big_loss", "settings": {"grad_cache_chunk_size": 4}}, "chinese_clip",
         {"1910.00762", "2101.06983", "2211.01335"}),
        ({"strategy": "clipscore"}, "vision-text-dual-encoder", {"2104.08718", "2103.00020"}),
        ({"strategy": "of_my_own"}, "clip", {"2103.00020"}),
    ],
)  # fmt: skip
def test_exactly_the_papers_of_the_methods_used_are_cited(tmp_path, metrics, model_type, papers):
    _, text = card(tmp_path, metrics=metrics, model=ModelFacts(model_type))
    assert set(re.findall(r"arXiv:(\d{4}\.\d{5})", text)) == papers


def test_papers_without_an_arxiv_id_and_of_a_locked_tower(tmp_path):
    frozen = recipe(model={"name_or_path": "me/clip", "freeze": "vision"})
    _, text = card(tmp_path, metrics={"strategy": "ncr"}, recipe=frozen)
    assert "Learning with Noisy Correspondence" in text and "Locked-image text Tuning" in text
    for metrics in (
        {"strategy": "noisy_channel"},
        {"strategy": "none", "settings": {"noisy_channel": {}}},
        {"strategy": "none", "settings": {"gsc": {"evidence": "posterior"}}},
    ):
        _, text = card(tmp_path, metrics=metrics)
        assert text.count("Analysis of a Microarray Experiment") == 1
    _, text = card(tmp_path, metrics={"strategy": "ncr"}, model=ModelFacts(feature_size=3))
    assert "Locked-image text Tuning" in text


def test_hyperparameters_that_differ_are_listed_and_housekeeping_is_not(tmp_path):
    settings = {"learning_rate": 0.5, "bf16": True, "optim": "adafactor", "logging_steps": 3, "save_total_limit": 1}
    settings |= {"gsc": {"gamma": 0.5}, "grad_cache_chunk_size": 8, "selection_scope": "global"}
    _, text = card(tmp_path, metrics=METRICS | {"settings": settings})
    table = text.split("### Hyper-parameters")[1].split("## Results")[0]
    assert re.findall(r"^\| (\w+) \|", table, re.MULTILINE) == ["learning_rate", "bf16", "optim"]
    for row in ('Soft labels (GSC) | {"gamma": 0.5}', "GradCache: pairs a pass | 8", "Selection: scope | global"):
        assert f"| {row} |" in text


def test_noise_is_told_where_the_truth_is_known(tmp_path):
    selection = {"noise_kept": 0.25, "noise_candidates": 0.4, "label_auroc": 0.875, "kept_share": 0.5}
    final = METRICS["final"] | {"noise_detection_auroc": 0.9, "noise_detection_num_scored": 9}
    _, text = card(tmp_path, metrics=METRICS | {"selection": selection, "final": final})
    noise = text.split("## Noise")[1].split("## Use")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", noise, re.MULTILINE)
    assert rows == [
        ("Mismatched among the candidates", "40.0 %"),
        ("Mismatched among the kept pairs", "25.0 %"),
        ("AUROC of the soft labels", "0.875"),
        ("Final scores: AUROC", "0.900"),
    ]
    assert "AUROC" not in text.split("## Results")[1].split("## Noise")[0]
    _, text = card(tmp_path, metrics=METRICS | {"selection": {"kept_share": 0.5}})
    assert "## Noise" not in text


def test_the_picture_is_shown_by_a_relative_link(tmp_path):
    _, text = card(tmp_path, picture="report.png", picture_text="Curves.")
    assert "\n![Curves.](report.png)\n" in text
    assert "![" not in card(tmp_path)[1]


def test_empty_metrics(tmp_path):
    metadata, text = card(tmp_path, metrics={})
    assert metadata["library_name"] == "transformers" and "was not evaluated" in text


MOLA = {"type": "mola", "trained_parameters": 12345, "settings": {"variant": "grad", "num_experts": 3, "r": 8}}
LORA = {"type": "lora", "trained_parameters": 10, "settings": {"r": 4, "target_modules": ["q_proj"]}}


def test_an_adapter_is_described_and_loaded_with_its_base(tmp_path):
    metadata, text = card(tmp_path, metrics=METRICS | {"adapter": MOLA}, base_model="openai/clip-vit-base-patch32")
    assert metadata["library_name"] == "peft" and metadata["base_model"] == "openai/clip-vit-base-patch32"
    assert {"clip", "dissect", "peft", "mola"} <= set(metadata["tags"])
    for row in (
        "| Adapter | MoLA, mixture of low-rank adapters |",
        "| Adapter: variant | grad |",
        "| Adapter: num_experts | 3 |",
        "| Adapter: r | 8 |",
        "| Trained parameters | 12,345 |",
    ):
        assert row in text
    assert "2406.09679" in text and "2402.08562" in text
    code = snippet(text)
    ast.parse(code)
    assert code.startswith("import hf_dissect ") and "model.set_task(0)" in code
    assert 'AutoModel.from_pretrained("openai/clip-vit-base-patch32")' in code


def test_another_adapter_needs_no_import_of_ours(tmp_path):
    _, text = card(tmp_path, metrics=METRICS | {"adapter": LORA}, model_id="me/x", base_model="/home/me/base")
    code = snippet(text)
    ast.parse(code)
    assert "hf_dissect" not in code and "2406.09679" not in text and "/home/me" not in text
    assert (
        'model_id = "me/x"' in code
        and "PeftModel.from_pretrained(base, model_id)" in code
        and "FOLDER_OF_THE_BASE_MODEL" in code
    )
    assert '| Adapter: target_modules | &#91;"q_proj"&#93; |' in text
    _, text = card(tmp_path, metrics=METRICS | {"adapter": LORA}, model_id="me/x")
    code = snippet(text)
    ast.parse(code)
    assert "AutoModel.from_pretrained(model_id, **place, adapter_kwargs=place)" in code and "base_model" in code
