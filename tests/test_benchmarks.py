"""The benchmarks that the documentation rests on run, on sizes too small to measure anything."""

import importlib
import itertools
import json
import logging
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, concatenate_datasets
from testing import tiny_models
from testing.trained_towers import save_text_tower, save_vision_tower

from hf_dissect import make_scenes
from hf_dissect.cli import main
from hf_dissect.selection import STRATEGIES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_main(name: str, *arguments: object) -> None:
    """Call the main function of a benchmark in this process, which has imported already what it needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "argv", [str(part) for part in (BENCHMARKS / f"{name}.py", *arguments)])
        module = importlib.import_module(name)
        if hasattr(module, "get_context"):  # workers that have imported already what they need, too
            patch.setattr(module, "get_context", lambda method: multiprocessing.get_context("fork"))
        module.main()


def import_benchmark(name: str):
    """Import a module of the folder of benchmarks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


def run_script(name: str, *arguments: object) -> None:
    """Run a benchmark in a process of its own."""
    command = [sys.executable, BENCHMARKS / f"{name}.py", *arguments]
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr


def run_benchmark(name: str, *arguments: object, run=run_main) -> dict:
    output = Path(f"{name}.json").resolve()
    run(name, *arguments, "--output", output)
    return json.loads(output.read_text())


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Restore what a benchmark sets for its whole process."""
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(1)
    transformers.utils.logging.enable_progress_bar()
    logging.disable(logging.NOTSET)


def test_ledger():
    results = run_benchmark("ledger", "--pairs", 5000, "--batch", 64, "--repeats", 3)
    assert results["row_numbers"]["bytes_per_pair_and_column"] == 4
    assert results["row_numbers"]["read_ms_median"] > 0 and results["hashed_ids"]["write_ms_p99"] > 0


def test_step_overhead():
    results = run_benchmark("step_overhead", "--rounds", 1, "--steps", 1, "--batch", 4)
    assert results["plain Trainer"]["wall"]["ratio_to_plain_median"] == 1
    assert results["none"]["processor"]["ms_per_step_median"] > 0


def test_differential():
    tower = "{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2"
    settings = [
        f"model.config.vision_config={tower}, image_size: 32, patch_size: 16}}",
        f"model.config.text_config={tower}, max_position_embeddings: 32}}",
        "data.scenes_train=64",
        "data.scenes_validation=8",
        "data.scenes_test=8",
        "evaluation.zero_shot=null",
        "selection.strategy=none",
        "selection.options={}",
        "selection.record=true",
        "training.num_train_epochs=3",
        "training.per_device_train_batch_size=32",
    ]
    assert main(["train", "quickstart", *settings, "--output-dir", "run"]) == 0
    results = run_benchmark("differential", "run")
    assert {warmup: list(row) for warmup, row in results["differential"].items()} == {"1": ["1", "2"], "2": ["2"]}
    assert all(0 <= auroc <= 1 for auroc in results["correlation"].values())


def write_flickr8k(count=32):
    """A folder as that of Flickr8k, with pictures of 32 pixels and random features."""
    random = np.random.default_rng(0)
    for split, rows in {"train": count, "validation": 8, "test": 8}.items():
        pairs = make_scenes(rows, split=split, captions_per_image=5, image_size=32)
        pairs.add_column("image_id", list(range(rows))).select_columns(["image", "captions", "image_id"]).to_parquet(
            f"{split}.parquet"
        )
    features = {split: random.normal(size=(rows, 1024)) for split, rows in {"train": count, "test": 8}.items()}
    np.savez("mobilenet_v1_features.npz", **features, validation=features["test"])
    order = np.arange(5 * count).reshape(count, 5)
    order[: 2 * count // 5] = np.roll(order[: 2 * count // 5], 1, axis=0)
    for name in ("noise40", "neighbours40"):
        np.save(f"caption_order_{name}.npy", order.ravel().astype(np.int32))


SMALL = ["training.num_train_epochs=2", "training.per_device_train_batch_size=32", "model.vocab_size=600"]


def test_noisy_correspondence():
    write_flickr8k()
    arguments = ["--data", ".", "--seeds", 0, *(part for pair in SMALL for part in ("--set", pair))]
    at_40 = [*arguments, "--noise", 40]
    results = run_benchmark("noisy_correspondence", *at_40, "--methods", "none,oracle")
    assert [run["steps"] for run in results["runs"]] == [10, 10]
    results = run_benchmark("noisy_correspondence", *at_40, "--methods", "none,ncr,gsc+")
    found = {run["method"]: run for run in results["runs"]}
    assert list(found) == ["none", "oracle", "ncr", "gsc+"]  # the first is not repeated
    assert {run["noise"] for run in found.values()} == {"random40"}
    assert all(len(run["epochs"]["test"]) == 2 and 0 <= run["last"] <= 600 for run in found.values())
    assert all(0 <= run["averaged"] <= 600 and run["averaged_validation"] > 0 for run in found.values())
    assert all(run["seconds_per_step"] == run["seconds"] / run["steps"] for run in found.values())
    assert found["gsc+"]["detection"] == found["gsc+"]["label_auroc"]
    assert found["ncr"]["detection"] == found["ncr"]["p_clean_auroc"]
    # Every other kind, one of which has nothing to detect.
    kinds = "random0,random80,neighbours20,neighbours40,partial40,absent40"
    more = run_benchmark("noisy_correspondence", *arguments, "--noise", kinds, "--methods", "none")["runs"][4:]
    assert [run["noise"] for run in more] == kinds.split(",")
    assert ["detection" in run for run in more] == [False, True, True, True, True, True]
    # 9 or 10 of 32 images are left out; the others, with 5 captions each, are 3 whole batches.
    assert [run["steps"] for run in more] == [10, 10, 10, 10, 10, 6]


def test_noisy_correspondence_on_pretrained_towers():
    write_flickr8k()
    random = np.random.default_rng(1)
    sizes = {"train": 32, "validation": 8, "test": 8}
    for name, dim, each in (("captions", 12, 5), ("efficientnet_lite0_features", 20, 1)):
        np.savez(f"{name}.npz", **{split: random.normal(size=(each * rows, dim)) for split, rows in sizes.items()})
    arguments = ["--data", ".", "--seeds", 0, *(part for pair in SMALL[:2] for part in ("--set", pair))]
    arguments += ["--towers", "captions.npz", "--noise", "40", "--methods", "repair"]
    results = run_benchmark("noisy_correspondence", *arguments)
    assert results["settings"][-1] == SMALL[1] and "data.text_features=captions.npz" in results["settings"]
    (run,) = results["runs"]
    assert run["steps"] == 10 and 0 <= run["target_share"] <= 1 and run["detection"] == run["evidence_auroc"]


def test_noisy_correspondence_with_a_reference():
    """The reference is a model that trained on the same features."""
    write_flickr8k()
    settings = ["data.path=.", "data.noise_permutation=caption_order_noise40.npy", *SMALL[1:]]
    settings += ["training.max_steps=2", "selection.strategy=none", "training.eval_strategy=no"]
    assert main(["train", "flickr8k-features", *settings, "--output-dir", "reference"]) == 0
    arguments = ["--data", ".", "--seeds", 0, *(part for pair in SMALL[:2] for part in ("--set", pair)), "--noise", 40]
    arguments += ["--methods", "learnability,rho,jest,coreset", "--reference", "reference"]
    runs = run_benchmark("noisy_correspondence", *arguments)["runs"]
    assert [run["method"] for run in runs] == ["learnability", "rho", "jest", "coreset"]
    assert all(0 <= run["last"] <= 600 and run["steps"] > 0 for run in runs)


def test_noisy_correspondence_in_the_time_of_plain_training():
    write_flickr8k()
    arguments = ["--data", ".", "--seeds", 0, *(part for pair in SMALL for part in ("--set", pair)), "--noise", 40]
    arguments += ["--methods", "none,random", "--budget", "time", "--timing-rounds", 1]
    plain, random = run_benchmark("noisy_correspondence", *arguments)["runs"]
    assert plain["steps"] == 10 and "step_ratio" not in plain
    assert random["steps"] == pytest.approx(10 / random["step_ratio"], abs=1.01)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("noisy_correspondence", ["--set", "selection.ratio=2"], "selection.ratio: 2 is not allowed"),
        ("noisy_correspondence", ["--noise", "near40"], "--noise: near40: choose of random0, random20"),
        ("noisy_correspondence", ["--methods", "rho"], "selection.reference"),
        ("noisy_correspondence", ["--methods", "none,best"], "--methods: best: choose of none, random"),
        ("time_to_quality", ["--method", "x=selection.strategy=best"], "selection.strategy: 'best' is not allowed"),
        ("time_to_quality", ["--method", "best"], "best: choose of none, random"),
        ("time_to_quality", ["--method", "none=selection.ratio=0.5"], "take another name"),
        ("time_to_quality", ["--every", 0], "--every 0: at least 1"),
        ("time_to_quality", ["--noise", "partial20"], "partial20: choose of random0"),
    ],
)
def test_bad_settings_are_refused_before_work_starts(name, given, message, capsys):
    with pytest.raises(SystemExit):
        run_main(name, "--data", "nowhere", *given)
    assert message in capsys.readouterr().err


@pytest.fixture
def noisy(monkeypatch):
    """The modules of the benchmark."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = ("noisy_tables", "noisy_methods", "noisy_runs", "time_to_quality")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def made_runs(sums: dict[str, dict[str, float]], seeds=(0, 1), averaged=0.0, **more) -> list[dict]:
    """Runs with recall sums that are the given ones, plus and minus one, and a gain by averaged weights."""
    return [
        {"method": method, "noise": noise, "seed": seed, "budget": "steps", "last": last + 2 * seed - 1, **more}
        | {"best": last, "best_epoch": 1, "detection": 0.5, "model_auroc": 0.5}
        | ({"averaged": last + averaged} if averaged else {})
        | {"seconds": 8.0, "steps": 40, "seconds_per_step": 0.2}
        for noise, of_noise in sums.items()
        for method, last in of_noise.items()
        for seed in seeds
    ]


AT_RANDOM = {"none": 100.0, "small_loss": 150.0, "dissect": 110.0, "oracle": 200.0}
CLEAN = {"none": 210.0, "oracle": 210.0}
NEARLY_FITTING = {"none": 150.0, "small_loss": 120.0, "dissect": 160.0, "oracle": 170.0}


def test_documents_are_written_from_the_runs(noisy, tmp_path, capsys):
    tables = noisy.noisy_tables
    runs = made_runs({"random40": AT_RANDOM, "neighbours40": NEARLY_FITTING, "random0": CLEAN}, averaged=13.0)
    Path("runs.json").write_text(json.dumps({"runs": runs}))
    (tmp_path / "docs").mkdir()
    for name, marker, _ in tables.DOCUMENTS:
        text = f"before\n<!-- {marker}: begin -->\nPREVIOUS\n<!-- {marker}: end -->\nafter\n"
        (tmp_path / name).write_text(text)
    run_main("noisy_correspondence", "--output", "runs.json", "--write-docs", tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "PREVIOUS" not in readme
    assert "| wrong captions | at random, 0 % | 40 % | nearly fitting, 40 % |" in readme
    assert "| `dissect` | - | 110.0 (123.0) | **160.0 (173.0)** |" in readme
    assert "| `small_loss` | - | **150.0 (163.0)** | 120.0 (133.0) |" in readme
    assert "DISSect ranks higher where wrong captions nearly fit than where they are" in readme
    gains = "+10.0 at random (40 %); +10.0 nearly fitting (40 %)"
    assert f"last step: {gains}. With averaged weights: {gains}. Bold:" in " ".join(readme.split())
    page = (tmp_path / "docs" / "which_method.md").read_text()
    assert "| `dissect` | - | 110.0 ± 1.4 (123.0) | **160.0 ± 1.4 (173.0)** |" in page
    assert "at 40 % `small_loss` is best of 3 (163.0), `dissect` has place 2 (123.0)." in page
    assert "between near neighbours: at 40 % `dissect` is best of 3 (173.0)." in page
    results = (tmp_path / "docs" / "results.md").read_text()
    assert "| `small_loss` | - | 150.0 ± 1.4 | - / 163.0 | - / 150.0 | - / 0.500 | - / 0.50 | - / 0.45 |" in results
    before = {name: (tmp_path / name).read_text() for name, _, _ in tables.DOCUMENTS}
    tables.write_docs(runs, tmp_path)
    assert before == {name: (tmp_path / name).read_text() for name, _, _ in tables.DOCUMENTS}
    run_main("noisy_correspondence", "--output", "runs.json", "--table")
    shown = capsys.readouterr().out
    assert "recall sum, last, all conditions" in shown and "averaged weights, all conditions" in shown
    (tmp_path / "README.md").write_text("no marker")
    with pytest.raises(ValueError, match="must stand in the document once each"):
        tables.write_docs(runs, tmp_path)


def test_sentences_follow_from_the_figures(noisy):
    tables = noisy.noisy_tables
    turned = tables.render_sentences(made_runs({"random40": NEARLY_FITTING, "neighbours40": AT_RANDOM}))
    assert "ranks no higher where wrong captions nearly fit" in turned and "ranks higher" not in turned
    assert "ranks higher" not in tables.render_sentences(made_runs({"random40": AT_RANDOM}))
    assert tables.render_sentences(made_runs({"random40": {"none": 1.0, "dissect": 2.0}})) == ""
    both = tables.render_gains(made_runs({"random40": AT_RANDOM, "neighbours40": NEARLY_FITTING}))
    assert max(map(len, both.splitlines())) <= 119
    table = tables.tabulate(made_runs({"random40": AT_RANDOM}, seeds=(0,)), "steps", ("none", "gsc"))
    assert table.splitlines()[2:] == ["| `none`: plain training | 99.0 |"]


def test_runs_of_earlier_versions_are_named_and_measured_again(noisy):
    old = {"method": "none", "noise": 20, "seed": 0, "last": 1.0, "seconds": 6.0, "steps": 3}
    (run,) = noisy.noisy_tables.modernise([old])
    assert (run["noise"], run["budget"], run["seconds_per_step"]) == ("random20", "steps", 2.0)
    assert not noisy.noisy_tables.is_complete(run)


def test_conditions_and_methods_are_named(noisy):
    methods = noisy.noisy_methods
    assert [methods.read_condition(text) for text in ("40", "random0", "partial40", "absent60")] == [
        "random40",
        "random0",
        "partial40",
        "absent60",
    ]
    for text in ("50", "neighbours", "near40", ""):
        with pytest.raises(ValueError, match="choose of random0"):
            methods.read_condition(text)
    options = SimpleNamespace(set=[], reference="reference")
    recipes = {name: noisy.noisy_runs.load_recipe(name, options) for name in methods.METHODS}
    assert set(STRATEGIES) <= {recipe.selection.strategy for recipe in recipes.values()}
    assert {name for name, recipe in recipes.items() if recipe.selection.reference} == set(methods.BY_REFERENCE)
    assert set(methods.IN_README) <= set(methods.METHODS)


def test_the_mean_of_the_weights(noisy):
    """The mean over the last three quarters of eight steps: those after the second."""
    model = torch.nn.Linear(1, 1)
    mean, state = noisy.noisy_runs.MeanWeights(), SimpleNamespace(max_steps=8)
    for step in range(1, 9):
        torch.nn.init.constant_(model.weight, float(step))
        state.global_step = step
        mean.on_step_end(None, state, None, model=model)
    with mean.used_by(model):
        assert model.weight.item() == pytest.approx(sum(range(3, 9)) / 6)
    assert model.weight.item() == 8


def test_time_to_quality():
    write_flickr8k()
    arguments = ["--data", ".", "--seeds", "0,1", *(part for pair in SMALL for part in ("--set", pair))]
    arguments += ["--every", 5, "--noise", "40,neighbours20", "--clock", "processor"]
    half = "half=selection.strategy=random,selection.ratio=0.5"
    results = run_benchmark("time_to_quality", *arguments, "--method", half)
    assert len(results["runs"]) == 8 and len(results["tables"]) == 2
    for run in results["runs"]:
        steps, seconds, recalls = zip(*run["curve"], strict=True)
        assert steps == (5, 10) and seconds[0] < seconds[1]
        assert run["reached"] == float(max(recalls) >= run["target"])
    plain = [run for run in results["runs"] if run["method"] == "none"]
    assert all(run["speed_up"] == run["steps"] == 1 and run["best"] == run["target"] for run in plain)
    again = run_benchmark("time_to_quality", *arguments, "--method", half)
    assert again["runs"] == results["runs"]  # not repeated


def test_time_to_quality_on_photographs():
    write_flickr8k()
    tower = "{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2"
    small = [*SMALL, f"model.config.vision_config={tower}, image_size: 32, patch_size: 16}}"]
    small += [
        f"model.config.text_config={tower}, max_position_embeddings: 32}}",
        "training.per_device_train_batch_size=80",
    ]
    arguments = ["--data", ".", "--pictures", "--seeds", 0, *(part for pair in small for part in ("--set", pair))]
    arguments += ["--every", 2, "--noise", "random0,neighbours20", "--method", "oracle"]
    runs = run_benchmark("time_to_quality", *arguments)["runs"]
    assert [(run["method"], run["noise"], run["data"]) for run in runs] == [
        (method, noise, "photographs") for noise in ("random0", "neighbours20") for method in ("none", "oracle")
    ]
    assert all([step for step, _, _ in run["curve"]] == [2, 4] for run in runs)


@pytest.mark.parametrize(("target", "found"), [(2.0, (10, 1.0)), (2.5, (20, 2.0)), (3.0, (20, 2.0)), (3.1, None)])
def test_the_first_evaluation_with_the_target_counts(noisy, target, found):
    assert noisy.time_to_quality.reach([(10, 1.0, 2.0), (20, 2.0, 3.0), (30, 3.0, 2.5)], target) == found


def test_times_are_compared_with_plain_training(noisy):
    runs = [{"method": "none", "curve": [(10, 4.0, 2.0), (20, 8.0, 3.0)]}]
    runs += [{"method": "a", "curve": [(10, 2.0, 3.0)]}, {"method": "b", "curve": [(40, 9.0, 2.9)]}]
    plain, fast, never = noisy.time_to_quality.compare(runs)
    assert (plain["speed_up"], plain["steps"]) == (1, 1)
    assert (fast["speed_up"], fast["steps"], fast["reached"]) == (4.0, 2.0, 1.0)
    assert never["reached"] == 0 and "speed_up" not in never and never["best"] == 2.9
    name, settings = noisy.time_to_quality.read_method("x=selection.strategy=random,model.config={a: 1, b: 2},a.b=3")
    assert (name, settings) == ("x", ["selection.strategy=random", "model.config={a: 1, b: 2}", "a.b=3"])


def test_cheap_scoring():
    small = ["data.scenes_train=256", "data.scenes_validation=64", "data.scenes_test=64"]
    small += ["training.num_train_epochs=1"]
    arguments = [part for setting in small for part in ("--set", setting)]
    results = run_benchmark("cheap_scoring", "--seeds", 0, "--ways", "3,4,7", "--photographs", 2, *arguments)
    rows = {row["way"]: row for row in results["rows"]}
    assert rows["whole pictures"]["agreement"]["mean"] == rows["whole pictures"]["step"]["mean"] == 1
    assert 0 < rows["half of the patches"]["agreement"]["mean"] <= 1 and len(results["runs"]) == len(rows) == 3
    assert results["decoding"].keys() == {"224", "112"}


def test_selection_efficiency():
    tiny_models.tiny_pairs(32, captions_per_image=5).to_parquet("train.parquet")
    np.savez("mobilenet_v1_features.npz", train=np.random.default_rng(0).normal(size=(32, 1024)).astype(np.float16))
    arguments = ["--data", ".", "--pairs", 32, "--batch", 16, "--epochs", 3, "--ratios", 0.5, "--m", 4]
    results = run_benchmark("selection_efficiency", *arguments)
    for kind in ("photographs", "features"):
        naive, planned = (results[kind]["0.5"][name] for name in ("every candidate scored", "m = 4"))
        assert naive["steady"]["forwards"] == 0.6 and naive["whole"]["loaded"] == 1
        assert planned["steady"]["loaded"] < 1 and 0.6 < planned["steady"]["forwards"] <= 1
        assert planned["whole"]["efficiency"] > 0 and planned["whole"]["loading"] > 0


def test_audit_scores():
    tower = "{hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2"
    settings = [
        f"model.config.vision_config={tower}, image_size: 32, patch_size: 16}}",
        f"model.config.text_config={tower}, max_position_embeddings: 32}}",
        "data.scenes_train=64",
        "data.scenes_validation=8",
        "data.scenes_test=8",
        "training.num_train_epochs=1",
        "training.per_device_train_batch_size=32",
    ]
    results = run_benchmark("audit_scores", *settings, "--seeds", 1, "--pairs", 40)
    assert "auroc_score" not in results["0% mismatched"] and 0 <= results["40% mismatched"]["auroc_score"]["mean"] <= 1


def test_audit_fit():
    rows = make_scenes(60, captions_per_image=5)
    rows.to_parquet("train.parquet")
    np.savez("features.npz", train=np.random.default_rng(0).normal(size=(60, 8)).astype(np.float16))
    np.save("caption_order_noise40.npy", np.roll(np.arange(300), 5))
    arguments = ["--data", ".", "--features", "features.npz", "--noise", "noise40", "--seeds", 1, "--models", 1]
    found = run_benchmark("audit_fit", *arguments, "--epochs", 1)["noise40"]
    assert found["mismatched"]["mean"] == 1 and found["interval_high"]["mean"] > 0.9 and found["minutes"]["mean"] < 1


PEERS = ("transformers Trainer", "open_clip", "sentence-transformers")


def test_peers_that_are_not_installed_are_lines_and_not_failures(capsys, monkeypatch):
    """The steps are compared with those of the peers that are there; a missing one says how to install it."""
    import_peer = import_benchmark("peer_steps").import_peer
    missing = ("open_clip", "open_clip_train", "sentence_transformers")
    for name in missing:  # also where they are installed
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(import_benchmark("peer_steps").NotInstalled, match="pip install open_clip_torch"):
        import_peer("open_clip", "open_clip_torch")
    small = ["--parts", "steps", "--size", "tiny", "--batch", 4, "--rounds", 3, "--warm-up", 1]
    results = run_benchmark("peers", *small)
    assert results["versions"]["torch"] == torch.__version__
    figures, left_out = results["steps"]["arms"], results["steps"]["not measured"]
    assert set(left_out) == set(PEERS[1:]) and "pip install sentence-transformers" in left_out[PEERS[2]]
    assert list(figures) == ["hf_dissect, plain", "hf_dissect, selected", PEERS[0], "fastest peer"]
    assert figures["hf_dissect, plain"]["wall"]["ours_over_this_median"] == 1
    assert figures["fastest peer"]["processor"]["name"] == PEERS[0]
    assert "not installed: pip install open_clip_torch" in capsys.readouterr().out


def test_ratios_of_peers_are_taken_round_by_round():
    peers = import_benchmark("peers")
    measured = {"ours": [(1.0, 2.0), (4.0, 2.0), (3.0, 2.0)], "other": [(2.0, 4.0), (2.0, 1.0), (6.0, 2.0)]}
    figures = peers.compare(measured, "ours", ("ours",))
    assert figures["other"]["wall"]["ours_over_this_median"] == 0.5  # of 1/2, 2 and 1/2
    assert figures["other"]["wall"]["ms_median"] == 2000
    assert figures["fastest peer"]["processor"] == {"name": "other", "ours_over_it_median": 1.0}


def test_arms_take_turns_and_end():
    """Each turn is one optimiser step of the arm, whatever loop it has; an error of an arm reaches who waits."""
    steps = import_benchmark("peer_steps")
    made = []

    def run(pause):
        for number in range(100):
            made.append(number)
            pause()

    arm = steps.Turns(run, 1, "cpu")
    assert made == []
    for number in range(3):
        wall, _ = arm.step()
        assert made == list(range(number + 1)) and wall >= 0
    arm.close()
    assert made == [0, 1, 2]

    def fail(pause):
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        steps.Turns(fail, 1, "cpu").step()


@pytest.mark.parametrize("shape", [(1, 40), (3, 10)])
def test_peers_read_the_same_shards(shape, monkeypatch):
    """Ours is measured where the others are not installed, from one shard as from several."""
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "open_clip_train", None)
    loading = ["--parts", "loaders", "--num-shards", shape[0], "--pictures", shape[1], "--loader-batch", 8]
    loading += ["--loader-batches", 2, "--loader-rounds", 1, "--buffer", 8, "--workers", 0]
    results = run_benchmark("peers", *loading)["loaders"]
    own = results["0 workers"]["loaders"]["hf_dissect"]
    assert results["shards"] == shape[0] and own["pictures_per_second"] > 0
    assert own["pictures_per_processor_second"] == pytest.approx(16000 / own["processor"]["ms_median"])
    assert set(results["0 workers"]["not measured"]) == {"webdataset", "open_clip"}


def test_gpu_without_cuda(capsys):
    """Nothing is run or written where there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run_main("gpu", "--output", "gpu.json")
    assert "skipped: no CUDA" in capsys.readouterr().out and not Path("gpu.json").exists()


def test_gpu_parts_on_the_cpu():
    results = run_benchmark("gpu", "--tiny", "--parts", "steps-b32,resume,fp16,adapters")
    assert list(results)[3:] == ["steps-b32", "resume", "fp16", "adapters"] and results["tiny"] is True
    for candidates in ("16", "32"):
        figures = results["steps-b32"][candidates]
        assert figures["selected 0.5"]["kept_pairs"] == int(candidates) // 2
        efficiency = figures["kept 0.2"]["ms_median"] / figures["rescore_every 8 0.2"]["ms_median"]
        assert figures["rescore_every 8 0.2"]["efficiency"] == pytest.approx(efficiency, abs=1e-3)
    assert results["resume"]["resumed run"] == {"same_bits": True, "largest_difference": 0.0}
    assert results["fp16"]["skipped"] == "float16 with a scaler needs CUDA"
    assert results["adapters"]["LoRA r"]["over_lora_r"] == 1 and "MoLA, router" in results["adapters"]


def test_gpu_parts_fail_or_end_and_the_others_follow(monkeypatch):
    """A part that fails has its error, one that is too slow is stopped, and one without time is not begun."""
    gpu = import_benchmark("gpu")

    def fail(run):
        raise ValueError("no room")

    def hang(run):
        run.found["so far"] = 1
        while True:
            time.sleep(0.01)

    quick = {"fails": (fail, 5), "hangs": (hang, 0.2), "works": (lambda run: {"figure": 1}, 5)}
    monkeypatch.setattr(gpu, "PARTS", quick)
    monkeypatch.setattr(gpu, "LEAST", 0)
    results = run_benchmark("gpu", "--tiny", "--parts", "fails,hangs,works")
    assert results["fails"]["error"] == "ValueError: no room" and "in fail" in results["fails"]["traceback"]
    assert results["hangs"]["error"].startswith("stopped after") and results["hangs"]["seconds"] < 5
    assert results["hangs"]["so far"] == 1 and "so far" not in results["works"]
    assert results["works"]["figure"] == 1
    monkeypatch.setattr(gpu, "LEAST", 10)
    late = run_benchmark("gpu", "--tiny", "--parts", "works", "--budget", 1)
    assert late["works"]["error"] == "not begun: the budget is spent"


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gpu", ["--parts", "steps"], "--parts steps: choose of steps-b32"),
        ("peers", ["--parts", "steps,shards"], "--parts shards: choose of steps, loaders"),
        ("peers", ["--arms", "open_clip"], "'hf_dissect, plain' must be one of them"),
        ("peers", ["--arms", "hf_dissect, plain;clip"], "--arms clip: choose of hf_dissect, plain"),
        ("peers", ["--size", "ViT-L"], "invalid choice"),
        ("peers", ["--rounds", 0], "at least 1"),
        ("peers", ["--shards", "none-{00..01}.tar"], "--shards: no file none-00.tar, none-01.tar"),
        ("gpu", ["--rounds", 0], "--rounds 0: at least 1"),
    ],
)
def test_unknown_parts_are_refused(name, given, message, capsys):
    with pytest.raises(SystemExit):
        run_main(name, *given)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_gpu_every_part_on_the_cpu():
    """Start a process with a process group, and run the peers that are installed."""
    results = run_benchmark("gpu", "--tiny", run=run_script)
    parts = import_benchmark("gpu").PARTS
    assert {name: results[name].get("error") for name in parts} == dict.fromkeys(parts)
    assert results["collectives"]["backend"] == "gloo" and results["collectives"]["global scope"]["same_pairs"]
    assert results["grad_cache"]["chunks of 1/16"]["ms_median"] > 0
    assert results["compile"]["compiled"]["ms_median"] > 0 and results["pictures"]["half side"]["ms_median"] > 0
    assert {"hf_dissect, plain", "transformers Trainer"} <= set(results["peers"])


@pytest.mark.slow
def test_grad_cache():
    """Start a process for each measurement of memory, each of which imports torch."""
    results = run_benchmark("grad_cache", "--chunk", 4, "--factors", 2, "--repeats", 1)
    cached, plain = results["grad_cache"]["2x"], results["plain"]["2x"]
    assert cached["inputs_mib"] == plain["inputs_mib"] > 0 and cached["batch"] == 8
    assert cached["seconds_per_step"]["mean"] > 0 and plain["processor_seconds_per_step"]["mean"] > 0


@pytest.mark.slow
def test_scaling():
    """Start torchrun twice."""
    ledger = ("--ledger-processes", 1, 2, "--ledger-pairs", 500, "--ledger-batch", 16, "--ledger-steps", 2)
    sizes = ("--steps", 3, "--batch", 8, "--pairs", 32, *ledger)
    results = run_benchmark("scaling", "--processes", 1, *sizes, "--quiet", run=run_script)
    assert [(row["processes"], row["ledger"]) for row in results["ledger"]] == [
        (1, "whole"),
        (2, "split"),
        (2, "whole"),
    ]
    assert [row["own_pairs"] for row in results["ledger"]] == [500, 250, 500]
    assert {run["scope"] for run in results["measured"]} == {"local", "global"}
    assert all(run["processor_ms"] > 0 and run["feature exchange"] == 0 for run in results["measured"])
    assert [len(parts) for parts in results["paper"].values()] == [14] * 4


def test_repair_cost():
    results = run_benchmark("repair_cost", "--batch", 16, "--dim", 16, "--rounds", 1)
    assert results["features"]["noisy_channel"]["ratio_median"] == 1
    assert set(results["small_clip"]) == {"noisy_channel", "learnt", "both sides", "average", "encoder"}
    assert all(kind["ms_per_step_median"] > 0 for kind in results["small_clip"].values())


def test_gsc_cost():
    results = run_benchmark("gsc_cost", "--batch", 8, "--dim", 16, "--rounds", 1)
    assert results["loss_alone"]["contrastive"]["processor"]["ratio_to_contrastive_median"] == 1
    assert results["loss_alone"]["gsc without evidence"]["processor"]["ms_per_step_median"] > 0


@pytest.mark.parametrize("model", ["tiny-clip", "tiny-llama", "tiny-resnet"])
def test_mola_cost(model):
    results = run_benchmark("mola_cost", "--model", model, "--experts", 2, 3, "--rounds", 1, "--r", 2)
    left_out = {"tiny-clip": {"xlora"}, "tiny-llama": set(), "tiny-resnet": {"poly", "xlora"}}[model]
    for methods in results["experts"].values():
        assert (
            left_out
            == {*("lora_r", "lora_Er", "poly", "xlora", "router", "grad_mixed", "grad_one_task")} - methods.keys()
        )
        parameters = {name: method["trainable_parameters"] for name, method in methods.items()}
        assert parameters["grad_mixed"] == parameters["grad_one_task"] == parameters["lora_Er"] < parameters["router"]
        assert methods["lora_r"]["ratio_to_lora_r_median"] == methods["lora_Er"]["ratio_to_lora_Er_median"] == 1
    assert results["experts"]["3"]["lora_r"]["trainable_parameters"] * 3 == parameters["lora_Er"]


@pytest.mark.slow
def test_mola_pacs():
    """Start workers, each of which imports torch."""
    for split in ("train", "validation"):
        parts = []
        for domain in range(2):
            rows = make_scenes(14, seed=domain, split=split).select_columns("image")
            parts.append(rows.add_column("label", [0, 1] * 7).add_column("domain", [domain] * 14))
        names = ClassLabel(names=["first", "second"])
        concatenate_datasets(parts).cast_column("domain", names).to_parquet(f"{split}.parquet")
    small = ["--side", 16, "--widths", "4,4,8", "--depths", "1,1", "--ranks", "1,2", "--epochs", 1, "--batch", 7]
    methods = ["hard-sharing", "mola-grad", "mola-router+twd"]
    results = run_benchmark(
        "mola_pacs",
        "--data",
        ".",
        *small,
        "--seeds",
        "0,1",
        "--methods",
        ",".join(methods),
        "--timing-rounds",
        1,
        run=run_script,
    )
    assert list(results["methods"]) == methods and len(results["runs"]) == 6
    assert all(0 <= row["accuracy"]["mean"]["mean"] <= 1 for row in results["methods"].values())
    assert results["methods"]["hard-sharing"]["ratio"] == 1


def write_tasks():
    """Two tasks of the table in one file, one of another name in a second."""
    random = np.random.default_rng(0)
    for path, names in {"two.npz": ("digits", "pacs-sketch"), "more.npz": ("own",)}.items():
        arrays = {}
        for place, name in enumerate(names):
            arrays[f"{name}/image"] = random.integers(0, 255, (30, 32, 32, 3), dtype=np.uint8)
            arrays[f"{name}/label"] = np.arange(30, dtype=np.int16) % (place + 2)
            arrays[f"{name}/split"] = np.arange(30, dtype=np.uint8) // 2 % 3
        np.savez(path, **arrays)


def test_mola_tasks(capsys):
    write_tasks()
    small = ["--data", ".", "--widths", "4,8", "--ranks", "1,2", "--batch", 4, "--workers", 1]
    few = ["--methods", "mola-grad-norms,lora-norms", "--tuning-steps", 1]
    results = run_benchmark("mola_tasks", *small, "--tune", *few)
    assert "clothing is not in .: left out" in capsys.readouterr().out
    assert list(results["tuned"]) == ["mola-grad-norms", "lora-norms"]
    assert len(results["trials"]) == 10, "three rates, and two more alphas of the best"
    for method, chosen in results["tuned"].items():
        own = [trial for trial in results["trials"] if trial["method"] == method]
        assert len(own) == 5 and chosen == max(own, key=lambda trial: trial["mean"])["settings"]
    assert {trial["split"] for trial in results["trials"]} == {"validation"}
    results = run_benchmark("mola_tasks", *small, "--seeds", 0, "--steps", 2)
    found = {made["method"]: made for made in results["runs"]}
    assert len(found) == len(results["runs"]) == 9 and {made["split"] for made in found.values()} == {"test"}
    assert all(list(made["accuracy"]) == ["digits", "pacs-sketch", "own"] for made in found.values())
    assert all(0 <= made["mean"] <= 1 and made["steps"] == 2 for made in found.values())
    assert found["mola-grad-norms"]["settings"] == results["tuned"]["mola-grad-norms"]
    assert all(abs(sum(row) - 1) < 1e-3 for row in found["mola-router"]["expert_weights"].values())
    counts = {method: made["parameters"] for method, made in found.items()}
    assert counts["lora"] == counts["mola-grad"] > counts["hard"] and counts["lora-norms"] > counts["lora"]
    again = run_benchmark("mola_tasks", *small, "--seeds", 0, "--steps", 2)
    assert again["runs"] == results["runs"], "not repeated"
    capsys.readouterr()
    run_main("mola_tasks", "--output", "mola_tasks.json", "--table")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 11 and rows[2][0] == "| single" and "gap closed" in rows[0]


def write_pacs(*splits):
    """Two domains of two classes, as pictures of 32 pixels."""
    for split in splits:
        parts = []
        for domain in range(2):
            rows = make_scenes(16, seed=domain, split=split, image_size=32).select_columns("image")
            parts.append(rows.add_column("label", [0, 1] * 8).add_column("domain", [domain] * 16))
        rows = concatenate_datasets(parts).cast_column("domain", ClassLabel(names=["art_painting", "sketch"]))
        rows.cast_column("label", ClassLabel(names=["dog", "elephant"])).to_parquet(f"{split}.parquet")


def test_mola_router():
    write_tasks()
    write_pacs("train", "validation")
    small = ["--steps", 2, "--batch", 8, "--rounds", 1, "--base", "tiny-resnet", "--seeds", 0, 1]
    small += ["--networks", "resnet8,convolutions", "--experts", 2]
    results = run_benchmark("mola_router", "--tasks", ".", "--pacs", ".", *small)
    assert list(results["networks"]) == ["resnet8", "convolutions"] and len(results["runs"]) == 16
    for network in results["networks"].values():
        assert network["ms"] > 0 and network["step"] > 0
        cells = {place: network[place] for place in ("tasks, labels", "tasks, decorrelation", "pacs, labels")}
        assert all(0 <= cell["accuracy"]["mean"] <= 1 for cell in cells.values())
        assert cells["tasks, decorrelation"]["decorrelation"]["mean"] > 0


def test_mola_clip_domains(capsys):
    """Other towers stand for the pretrained ones, in their folders."""
    Path("pairs").mkdir()
    make_scenes(8, captions_per_image=2, image_size=32).to_parquet("pairs/train.parquet")
    write_pacs("train", "validation", "test")
    save_vision_tower(Path("towers/efficientnet_lite0"), "resnet")
    save_text_tower(Path("towers/minilm"))
    places = ["--pairs", "pairs", "--data", ".", "--cache", "cache", "--towers", "towers"]
    small = ["--side", 32, "--steps", 2, "--batch", 8, "--r", 1, "--layers", ".*convolution", "--rates", 1e-3, 1e-2]
    small += ["--alignment-steps", 2, "--seeds", 0, 1]
    results = run_benchmark("mola_clip_domains", *places, *small)
    assert list(results["methods"]) == ["none", "lora", "grad", "router", "router+twd"]
    assert len(results["runs"]) == 1 + 4 * 3, "two rates of the first seed, the better one of the second"
    for method, rate in list(results["rates"].items())[1:]:
        own = [made for made in results["runs"] if made["method"] == method]
        tried = [made for made in own if made["seed"] == 0]
        assert rate == max(tried, key=lambda made: made["validation"]["mean"])["lr"] == own[-1]["lr"]
    for made in results["runs"]:
        assert list(made["test"]) == ["art_painting", "sketch", "mean"]
        assert made["test"]["mean"] == pytest.approx((made["test"]["art_painting"] + made["test"]["sketch"]) / 2)
    counts = {made["method"]: made["parameters"] for made in results["runs"]}
    assert counts["none"] == 0 < counts["lora"] == counts["grad"] < counts["router"] < counts["router+twd"]
    again = run_benchmark("mola_clip_domains", *places, *small)
    assert again["runs"] == results["runs"], "not repeated"
    capsys.readouterr()
    run_main("mola_clip_domains", "--output", "mola_clip_domains.json", "--table")
    assert len(capsys.readouterr().out.splitlines()) == 7
    with pytest.raises(SystemExit, match="has other settings"):
        run_main("mola_clip_domains", *places, *small, "--r", 2, "--output", "mola_clip_domains.json")


def write_actions():
    """Recordings of four actions by eight subjects, in three modalities."""
    random = np.random.default_rng(0)
    np.savez(
        "utd.npz",
        depth=random.integers(0, 255, (128, 2, 24, 32), dtype=np.uint8),
        skeleton=random.normal(size=(128, 8, 20, 3)).astype(np.float32),
        inertial=random.normal(size=(128, 8, 6)).astype(np.float32),
        action=np.arange(128) // 8 % 4 + 1,
        subject=np.arange(128) % 8 + 1,
        trial=np.arange(128) // 32 + 1,
    )


def write_described_features(count: int = 40):
    """Features of photographs, and of five captions of each, in the files of Flickr8k."""
    random = np.random.default_rng(0)
    words = ["dog", "beach", "snow", "children", "street", "football", "water", "mountain", "bicycle", "crowd"]
    for split in ("train", "validation", "test"):
        captions = [[f"the {words[row % 10]} and a {words[row % 3]}"] * 5 for row in range(count)]
        Dataset.from_dict({"captions": captions}).to_parquet(f"{split}.parquet")
    for name, per_row, size in (("mobilenet_v1_features", 1, 1024), ("captions", 5, 384)):
        features = {split: random.normal(size=(count * per_row, size)) for split in ("train", "validation", "test")}
        np.savez(f"{name}.npz", **{split: values.astype(np.float16) for split, values in features.items()})


def test_distillation(capsys, monkeypatch):
    write_actions()
    write_described_features()
    monkeypatch.setattr(import_benchmark("distillation_settings"), "SCENES", 3)
    small = ["training.max_steps=2", "training.per_device_train_batch_size=8", "training.logging_steps=1"]
    small += ["training.logging_strategy=steps"]
    places = [
        "--utd",
        "utd.npz",
        "--flickr",
        ".",
        "--seeds",
        "0",
        *(part for pair in small for part in ("--set", pair)),
    ]
    methods = ["student", "hinton", "amid", "amid without information_auxiliary", "auto"]
    settings = ["utd-quarter", "utd-unknown", "scenes-300"]
    chosen = ["--methods", ",".join(methods), "--settings", ",".join(settings)]
    results = run_benchmark("distillation", *places, *chosen)
    assert [(made["setting"], made["method"]) for made in results["runs"]] == list(
        itertools.product(settings, methods)
    )
    by_name = {(made["setting"], made["method"]): made for made in results["runs"]}
    assert "teacher" not in by_name["utd-quarter", "student"]["figures"]
    assert all(0 <= figure <= 1 for made in results["runs"] for figure in made.get("figures", {}).values())
    assert {"mAP", "R@1", "teacher"} <= set(by_name["scenes-300", "amid"]["figures"])
    logs = [set(by_name["utd-quarter", method]["log"]) for method in methods[1:4]]
    assert logs[1] - logs[2] == {"information_auxiliary"} and "generator_error" in logs[1] - logs[0]
    assert by_name["utd-quarter", "auto"]["criterion"]["unlabelled_share"] == pytest.approx(0.75)
    assert by_name["utd-unknown", "auto"]["criterion"]["unlabelled_share"] == pytest.approx(0.5)
    again = run_benchmark("distillation", *places, *chosen)
    assert again["runs"] == results["runs"], "not repeated"
    capsys.readouterr()
    run_main("distillation", "--output", "distillation.json", "--table")
    printed = capsys.readouterr().out
    assert printed.count("Predicted: gain") == 3 and "| `amid without information_auxiliary` |" in printed


def test_the_labels_that_a_setting_keeps():
    settings = import_benchmark("distillation_settings")
    columns = {"subject": np.repeat([1, 3, 5, 7], 108), "action": np.tile(np.repeat(np.arange(27) + 1, 4), 4)}
    columns["trial"] = np.tile(np.arange(4) + 1, 108)
    for share in (1, 1 / 2, 1 / 4, 1 / 8):
        kept = settings.keep_share(share)(columns)
        assert kept.sum() == 432 * share
        assert set(columns["action"][kept]) == set(range(1, 28)), "each action keeps a label"
    unknown = columns["action"][~settings.keep_known_actions(columns)]
    assert set(unknown) == set(range(2, 28, 2))


@pytest.mark.slow
def test_faults():
    """Train a dozen times, and start from a process without threads."""
    run_script("faults", "--trials", 1, "--faults", "kill,kill-ranks,nan", "--output-dir", ".")
    rows = json.loads(Path("results/faults.json").read_text())["faults"]
    ranks = "kill -9, stream, 2 ranks with a sharded ledger"
    assert [row["fault"] for row in rows] == ["kill -9", ranks, "NaN in a weight or in the loss"]
    assert all(row["tried"] == 1 and row["differ"] == 0 and row["resumed_from_older"] == 0 for row in rows)
    assert "| kill -9 | 1 |" in Path("faults.md").read_text()


def test_compiled_steps():
    sizes = ("--rounds", 1, "--steps", 2, "--batch", 4, "--backend", "eager")
    results = run_benchmark("compiled_steps", *sizes)
    assert results["eager"]["ratio_to_eager_median"] == 1 and results["eager"]["graphs"] == 0
    lengths = results["lengths"]["compiled, few lengths"]
    assert set(lengths) <= {16, 32, 48, 64, 77} and results["compiled, few lengths"]["graphs"] == 2 * len(lengths)


def test_decoding():
    write_flickr8k()
    results = run_benchmark("decoding", "--data", "train.parquet", "--rounds", 1, "--pictures", 2, "--largest", 320)
    for kind in ("smooth 320 x 240", "noise 320 x 240", "photographs"):
        assert results[kind]["Pillow"]["ratio_to_pillow_median"] == 1
        assert results[kind]["decode_image"]["largest"] == 0 and results[kind]["decode_image, fast"]["largest"] == 0
        assert results[kind]["collator"]["pictures_per_second_median"] > 0


def test_caption_padding():
    write_flickr8k()
    sizes = ("--batches", 4, "--rounds", 1, "--pairs", 2, "--seeds", "0,1", "--tiny")
    results = run_benchmark("caption_padding", "--data", "train.parquet", *sizes)["batch of 4"]
    lengths = results["padded_length"]
    assert lengths["grouped"] <= lengths["longest"] <= lengths["few lengths"]
    assert results["step_relative_to_longest"]["ViT-B/32"]["longest"] == 1
