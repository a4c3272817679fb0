import json

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_dissect import DissectTrainingArguments
from hf_dissect.selection import STRATEGIES


def arguments(**settings) -> DissectTrainingArguments:
    return DissectTrainingArguments("unused", **{"per_device_train_batch_size": 16, **settings})


def test_the_defaults_are_those_that_the_help_tells():
    args = arguments()
    assert isinstance(args, TrainingArguments)
    assert (args.selection_strategy, args.selection_ratio, args.selection_warmup_epochs) == ("dissect", 0.5, 1)
    assert (args.max_bad_fraction, args.record_selection, args.mask_false_negatives) == (0.01, False, False)
    assert args.selection_options == {} and args.scoring_batch_size is None and args.max_caption_length is None
    assert args.column_names() == dict.fromkeys(["image", "caption", "sample_id", "task", "clean"])


def test_column_names_are_keywords_of_as_pairs():
    args = arguments(image_column="a", caption_column="b", id_column="c", task_column="d", clean_column="e")
    assert args.column_names() == {"image": "a", "caption": "b", "sample_id": "c", "task": "d", "clean": "e"}


@pytest.mark.parametrize(
    ("ratio", "batch", "kept"), [(0.5, 16, 8), (1.0, 16, 16), (0.1, 20, 2), (2 / 3, 3, 2), (0.3, 512, 154)]
)
def test_the_number_of_kept_pairs(ratio, batch, kept):
    args = arguments(selection_ratio=ratio, per_device_train_batch_size=batch)
    assert args.num_selected(args.per_device_train_batch_size) == kept


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_is_built(strategy):
    assert arguments(selection_strategy=strategy).make_strategy().name == strategy


def test_options_reach_the_strategy_also_as_json():
    for options in ({"variant": "momentum", "momentum": 0.8}, '{"variant": "momentum", "momentum": 0.8}'):
        strategy = arguments(selection_options=options).make_strategy()
        assert (strategy.variant, strategy.momentum) == ("momentum", 0.8)
    assert arguments(selection_warmup_epochs=2).make_strategy().warmup_epochs == 2
    assert (
        arguments(selection_options={"warmup_epochs": 1}, selection_warmup_epochs=2).make_strategy().warmup_epochs == 1
    )


def test_options_given_are_not_changed():
    options = {"variant": "momentum"}
    args = arguments(selection_options=options)
    args.selection_options["momentum"] = 0.5
    assert options == {"variant": "momentum"}


def test_soft_labels_are_asked_for_by_name_also_as_json():
    assert arguments().gsc is None and arguments().make_robust_objective() is None
    complete = {"gamma": 0.01, "beta": 0.7, "temperature": 0.07, "warmup_epochs": 1, "dual": False}
    complete["evidence"] = "probability"
    given = {}
    assert arguments(gsc=given).gsc == complete == arguments(gsc="{}").gsc and given == {}
    gsc = arguments(gsc='{"beta": 0.5, "gamma": 0.1}', seed=7).make_robust_objective()
    assert (gsc.beta, gsc.gamma, gsc.seed) == (0.5, 0.1, 7)


def test_the_noisy_channel_is_asked_for_by_name_also_as_json():
    assert arguments().noisy_channel is None and arguments().make_robust_objective() is None
    for given in ({}, "{}"):
        args = arguments(noisy_channel=given, selection_strategy="none", mask_false_negatives=True)
        assert args.noisy_channel == {"smoothing": 0.0} and args.make_robust_objective().name == "noisy_channel"


@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.01, 2, float("nan"), float("inf"), "half", None, True])
def test_a_ratio_outside_of_its_range_is_told(ratio):
    with pytest.raises(ValueError, match=r"selection_ratio=.* is not allowed; allowed: a number,? in \(0, 1\]\.$"):
        arguments(selection_ratio=ratio)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "1%", None])
def test_a_share_of_bad_rows_outside_of_its_range_is_told(share):
    with pytest.raises(ValueError, match=r"max_bad_fraction=.* is not allowed; allowed: a number,? in \[0, 1\]\.$"):
        arguments(max_bad_fraction=share)


@pytest.mark.parametrize(
    ("ratio", "batch", "kept"), [(0.1, 16, "1.6 pairs"), (0.5, 2, "1 pair;"), (0.5, 3, "1.5 pairs")]
)
@pytest.mark.parametrize("strategy", ["dissect", "random", "small_loss"])
def test_fewer_than_two_pairs_are_told(ratio, batch, kept, strategy):
    expected = f"selection_ratio={ratio} of per_device_train_batch_size={batch} keeps {kept}.*Raise one of the two"
    with pytest.raises(ValueError, match=expected):
        arguments(selection_ratio=ratio, per_device_train_batch_size=batch, selection_strategy=strategy)


def test_the_ratio_is_without_effect_where_all_pairs_are_kept():
    arguments(selection_strategy="none", selection_ratio=0.1, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="per_device_train_batch_size=1 keeps 1 pair;"):
        arguments(selection_strategy="none", per_device_train_batch_size=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection_strategy": "best"}, "selection_strategy='best' is not allowed; allowed: dissect, random"),
        ({"selection_strategy": None}, "selection_strategy=None is not allowed; allowed: dissect, random"),
        ({"selection_scope": "locl"}, "selection_scope='locl' is not allowed; allowed: local, global; did you mean"),
        ({"selection_options": {"varient": "momentum"}}, "selection_options=.*varient"),
        ({"selection_options": {"variant": "fast"}}, "variant='fast' is not allowed; allowed: warmup, momentum"),
        ({"selection_options": "momentum"}, "selection_options='momentum': must be a dict, or JSON of one"),
        ({"selection_options": '{"variant"'}, "must be a dict, or JSON of one"),
        ({"selection_options": ["variant"]}, "must be a dict, or JSON of one"),
        (
            {"selection_strategy": "random", "selection_options": {"variant": "momentum"}},
            "selection_options=.*variant",
        ),
        ({"selection_warmup_epochs": 0}, "warmup_epochs=0: the warm-up variant needs at least 1"),
        ({"selection_warmup_epochs": -1}, "selection_warmup_epochs=-1 is not allowed; allowed: at least 0"),
        ({"selection_warmup_epochs": 1.5}, "selection_warmup_epochs=1.5 .* an integer, at least 0"),
        ({"scoring_batch_size": 0}, "scoring_batch_size=0 is not allowed; allowed: at least 1 or null"),
        ({"scoring_batch_size": "8"}, "scoring_batch_size='8' .* an integer or null, at least 1"),
        ({"max_caption_length": 2}, "max_caption_length=2 is not allowed; allowed: at least 3 or null"),
        ({"gsc": {"gama": 0.1}}, "gsc=.*gama.*'gama' is not a setting of it; allowed: gamma"),
        ({"gsc": {"beta": 2}}, "gsc: beta=2 is not allowed; allowed: a number in"),
        ({"gsc": {"warmup_epochs": 1.5}}, "gsc: warmup_epochs=1.5 .* an integer, at least 0"),
        ({"gsc": False}, "gsc=False: must be a dict, or JSON of one"),
        ({"gsc": "yes"}, "gsc='yes': must be a dict, or JSON of one"),
        ({"gsc": {}, "mask_false_negatives": True}, "gsc=.*does not go with mask_false_negatives"),
        ({"noisy_channel": {"pi": 0.5}}, "noisy_channel={'pi': 0.5}: 'pi' is not a setting of it; allowed: smoothing"),
        ({"noisy_channel": True}, "noisy_channel=True: must be a dict, or JSON of one, such as {.smoothing.: 0.0}"),
        ({"noisy_channel": "yes"}, "noisy_channel='yes': must be a dict, or JSON of one"),
        ({"noisy_channel": {}, "gsc": {}}, "noisy_channel={.*} does not go with gsc: each replaces the contrastive"),
        (
            {"noisy_channel": "{}", "selection_strategy": "noisy_channel"},
            "noisy_channel={.*} does not go with the strategy noisy_channel: .* count twice; set the objective",
        ),
        ({"gsc": {"warmup_epochs": 3}}, "gsc: warmup_epochs=3 leaves no epoch with soft labels in num_train_epochs=3"),
    ],
)
def test_impossible_values_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(**settings)


def test_a_warm_up_that_leaves_nothing_to_select_is_told():
    with pytest.raises(ValueError, match="selection_warmup_epochs=3 leaves nothing to select in num_train_epochs=3"):
        arguments(selection_warmup_epochs=3, num_train_epochs=3)
    arguments(selection_warmup_epochs=2, num_train_epochs=2.5)
    arguments(selection_warmup_epochs=3, max_steps=10)  # how many epochs that is depends on the data
    arguments(selection_warmup_epochs=3, selection_options={"variant": "momentum"})
    arguments(selection_warmup_epochs=3, selection_strategy="random")


def test_the_command_line_of_transformers_knows_the_arguments():
    words = (
        "--output_dir unused --selection_strategy dissect --selection_ratio 0.25 --record_selection --task_column t"
    )
    words = [*words.split(), "--selection_options", '{"variant": "momentum"}', "--scoring_batch_size", "4"]
    (args,) = HfArgumentParser(DissectTrainingArguments).parse_args_into_dataclasses(words)
    assert (args.selection_ratio, args.record_selection, args.task_column) == (0.25, True, "t")
    assert args.selection_options == {"variant": "momentum"} and args.scoring_batch_size == 4


def test_the_arguments_are_json():
    args = arguments(selection_options={"variant": "momentum"})
    assert json.loads(args.to_json_string())["selection_options"] == {"variant": "momentum"}
