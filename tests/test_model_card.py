"""The card must stay readable for the Hub (YAML) and must not carry local paths or foreign markup."""

import ast
import re

import pytest
import yaml

from hf_dissect.model_card import write_model_card

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


def test_metadata(tmp_path):
    metadata, text = card(tmp_path, base_model="openai/clip-vit-base-patch32", recipe_name="clip-finetune")
    assert metadata["library_name"] == "transformers" and metadata["base_model"] == "openai/clip-vit-base-patch32"
    assert {"clip", "dissect", "image-text-retrieval"} <= set(metadata["tags"])
    assert "# clip-finetune" in text


def test_body_says_selection_cost_results_and_citation(tmp_path):
    _, text = card(tmp_path)
    for row in (
        "| Selection: strategy | dissect |",
        "| Selection: ratio | 0.5 |",
        '| Selection: options | {"variant": "momentum"} |',
        "| Wall-clock | 100.0 s |",
        "| Time for scoring | 25.0 % |",
        "| Mismatched pairs among kept | 25.0 % |",
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
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    ast.parse(code)
    assert code.count('from_pretrained("me/quick")') == 2


def test_markup_in_names_stays_text(tmp_path):
    metrics = METRICS | {"final": {"a|b<script>": 1.0}, "strategy": "x|y\n# z"}
    metadata, text = card(tmp_path, metrics=metrics, recipe_name="<script>\n---\nlicense: mit")
    assert "<script>" not in text and "license" not in metadata
    assert "\n# z" not in text and "| A&#124;b&#60;script&#62; | 1 |" in text


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
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    ast.parse(code)
    assert code.startswith("import hf_dissect ") and "model.set_task(0)" in code
    assert 'AutoModel.from_pretrained("openai/clip-vit-base-patch32")' in code


def test_another_adapter_needs_no_import_of_ours(tmp_path):
    _, text = card(tmp_path, metrics=METRICS | {"adapter": LORA}, model_id="me/x", base_model="/home/me/base")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    ast.parse(code)
    assert "hf_dissect" not in code and "2406.09679" not in text and "/home/me" not in text
    assert 'PeftModel.from_pretrained(base, "me/x")' in code and "FOLDER_OF_THE_BASE_MODEL" in code
    assert '| Adapter: target_modules | &#91;"q_proj"&#93; |' in text
    _, text = card(tmp_path, metrics=METRICS | {"adapter": LORA}, model_id="me/x")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    ast.parse(code)
    assert 'AutoModel.from_pretrained("me/x", subfolder="base_model"' in code
