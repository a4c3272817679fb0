"""Method auto trains a pilot, picks a method by what it measures, and then trains as if that method had been named."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from testing.tiny_modalities import tiny_arguments, tiny_auxiliaries, tiny_columns, tiny_student

from hf_dissect.cli import main
from hf_dissect.distillation import DistillationRecipe, DistillationTrainer, choose_method
from hf_dissect.recipe.recipe import RecipeError
from hf_dissect.runs.distil import load_columns

ENCODERS = [
    "student.config={model_type: frame_sequence_encoder, channels: [4], hidden_size: 8, grid: [1, 1], dropout: 0.2}",
    "auxiliaries.skeleton.config={model_type: sequence_encoder, num_channels: 6, hidden_size: 8}",
    "auxiliaries.inertial.config={model_type: sequence_encoder, num_channels: 2, hidden_size: 8}",
]
RUN = ["training.max_steps=4", "training.use_cpu=true", "training.per_device_train_batch_size=8"]
RUN += ["training.report_to=none", "training.disable_tqdm=true", "training.eval_strategy=no"]
RUN += ["training.save_strategy=steps", "training.save_steps=2", "distillation.pilot_epochs=1"]
AUTO = "distillation.method=auto"


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Rows of eight subjects; half of those of the training subjects have no label."""
    columns = tiny_columns(160)
    columns["subject"] = np.arange(160) // 4 % 8 + 1
    columns["action"] = np.where(np.arange(160) // 32 % 2 == 0, columns["action"].astype("<U1"), "")
    path = tmp_path_factory.mktemp("arrays") / "rows.npz"
    np.savez(path, **columns)
    return path


def recipe_of(arrays, folder, *overrides) -> DistillationRecipe:
    given = [f"data.path={arrays}", f"training.output_dir={folder}"]
    return DistillationRecipe.load("amid-utd-mhad", [*ENCODERS, *given, *RUN, *overrides])


class _TrainOnly(dict):
    def __getitem__(self, split):
        assert split == "train", f"the pilot reads {split}"
        return super().__getitem__(split)


def test_a_pilot_holds_out_a_group_and_reads_no_other_split(arrays, tmp_path):
    recipe = recipe_of(arrays, tmp_path / "run", AUTO)
    splits = load_columns(recipe.data)
    chosen = choose_method(recipe, _TrainOnly(splits))
    assert chosen.held_out == "20 training rows that the pilot did not train on"  # one subject of three
    assert (chosen.rows, chosen.held_out_rows) == (40, 20) and chosen.unlabelled_share == pytest.approx(0.4)
    assert chosen.method in ("student", "hinton", "amid") and chosen.seconds > 0
    again = choose_method(recipe, splits)
    assert again.to_dict() | {"seconds": 0} == chosen.to_dict() | {"seconds": 0}
    assert not (tmp_path / "run").exists()


def test_auto_is_the_run_of_the_method_it_picks(arrays, tmp_path, capsys, caplog):
    settings = [*ENCODERS, f"data.path={arrays}", *RUN]
    assert main(["train", "amid-utd-mhad", *settings, AUTO, "--output-dir", str(tmp_path / "auto")]) == 0
    metrics = json.loads((tmp_path / "auto" / "metrics.json").read_text())
    choice = metrics["information"]["choice"]
    assert f"distillation.method auto: {choice['sentence']}" in capsys.readouterr().out
    assert metrics["method"] == choice["method"] != "student" and choice["seconds"] > 0
    assert (
        yaml.safe_load((tmp_path / "auto" / "recipe.yaml").read_text())["distillation"]["method"] == choice["method"]
    )
    assert choice["sentence"] in (tmp_path / "auto" / "report.html").read_text()
    assert "Method chosen by a pilot" in (tmp_path / "auto" / "README.md").read_text()

    named = [*settings, f"distillation.method={choice['method']}", "distillation.measure_information=false"]
    assert main(["train", "amid-utd-mhad", *named, "--output-dir", str(tmp_path / "named")]) == 0
    for name in ("model.safetensors", "checkpoint-2/model.safetensors"):
        auto, other = (load_file(tmp_path / run / name) for run in ("auto", "named"))
        assert auto.keys() == other.keys() and all(torch.equal(auto[key], other[key]) for key in auto)

    # The resumed run continues with the method, and with the pilot that chose it.
    more = [*settings, AUTO, "training.max_steps=6", "--resume", "--output-dir", str(tmp_path / "auto")]
    assert main(["train", "amid-utd-mhad", *more]) == 0
    resumed = json.loads((tmp_path / "auto" / "metrics.json").read_text())
    assert resumed["information"]["choice"] == choice and resumed["method"] == choice["method"]
    assert resumed["steps"] == 6 and "the method of its checkpoint" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "auto")]) == 0

    (tmp_path / "auto" / "checkpoint-6" / "recipe.yaml").unlink()
    assert main(["train", "amid-utd-mhad", *more]) == 2
    assert "does not say which method it trains" in capsys.readouterr().err


def test_full_labels_leave_the_student_alone(arrays, tmp_path):
    with np.load(arrays) as stored:
        columns = dict(stored) | {"action": np.arange(160) % 4}
    np.savez(tmp_path / "full.npz", **columns)
    recipe = recipe_of(tmp_path / "full.npz", tmp_path / "run", AUTO)
    chosen = choose_method(recipe, load_columns(recipe.data))
    assert (chosen.method, chosen.gain) == ("student", 0.0) and "train the student alone" in chosen.sentence


@pytest.mark.parametrize(
    "settings, message",
    [
        (["distillation.term_weights.hinton=1"], "needs a method by name; auto takes the weights of its choice"),
        (["auxiliaries={}"], "auxiliaries: missing"),
        (["distillation.pilot_epochs=0"], "distillation.pilot_epochs"),
        (["distillation.pilot_epochs=1.5"], "distillation.pilot_epochs"),
    ],
)
def test_faults_are_named_before_the_pilot(settings, message, arrays, tmp_path):
    with pytest.raises(RecipeError, match=message):
        recipe_of(arrays, tmp_path, AUTO, *settings)


@pytest.mark.parametrize(
    "setting, message",
    [
        ("training.metric_for_best_model=teacher_accuracy", "'teacher_accuracy' is not a figure of the evaluation"),
        ("data.label_column=verb", "There is no column 'verb'"),
    ],
)
def test_what_a_choice_could_not_do_is_refused_before_the_pilot(setting, message, arrays, tmp_path, capsys):
    settings = [*ENCODERS, f"data.path={arrays}", *RUN, AUTO, setting]
    settings += ["training.load_best_model_at_end=true", "training.eval_strategy=steps", "training.eval_steps=2"]
    assert main(["train", "amid-utd-mhad", *settings, "--output-dir", str(tmp_path / "run")]) == 2
    outputs = capsys.readouterr()
    assert message in outputs.err and "s for the pilot" not in outputs.out


def test_a_trainer_names_the_function_that_chooses(tmp_path):
    arguments = tiny_arguments(tmp_path, method="auto")
    with pytest.raises(ValueError, match=r"hf_dissect\.distillation\.choose_method\(recipe, splits\)"):
        DistillationTrainer(tiny_student(), arguments, tiny_auxiliaries(), tiny_columns())
