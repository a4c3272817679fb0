"""One noun of a caption replaced: how many captions, which words, and what is refused."""

import itertools

import pytest
from datasets import Dataset

from hf_dissect import Recipe, load_splits, make_scenes
from hf_dissect.data import noise_kinds, replace_nouns
from hf_dissect.data.noise_kinds import describe_noise
from hf_dissect.data.noun_noise import find_nouns
from hf_dissect.recipe import schema

NOUNS = ("dog", "man", "ball", "child", "apple", "horse")
PLACES = ("beach", "street", "owl house", "park")
TEXTS = [
    f"{article} {colour} {noun} runs on the {place}."
    for (noun, place), (article, colour) in itertools.product(
        itertools.product(NOUNS, PLACES), (("A", "brown"), ("Two", "young"), ("the", "small"))
    )
] + [f"{'an' if noun == 'apple' else 'a'} {noun} in the park" for noun in NOUNS for _ in range(6)]


def rows_of(captions):
    name = "caption" if isinstance(captions[0], str) else "captions"
    return Dataset.from_dict({name: captions, "row": list(range(len(captions)))})


def differences(old, new):
    """Return the words that two captions do not share, pair by pair; articles are another thing."""
    words = [text.replace(".", "").split() for text in (old, new)]
    assert len(words[0]) == len(words[1])
    pairs = [(a, b) for a, b in zip(*words, strict=True) if a != b]
    return [(a, b) for a, b in pairs if {a.lower(), b.lower()} != {"a", "an"}]


def test_nouns_are_found_by_the_words_around_them():
    found = {word for places in find_nouns(TEXTS) for _, _, word in places}
    assert {*NOUNS, "beach", "street", "park", "house"} <= found
    assert not found & {"brown", "young", "small", "runs", "owl", "a", "the", "on"}


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.77, 1.0])
def test_exactly_the_share_of_captions_differs_in_one_noun(rate):
    dataset = rows_of(TEXTS)
    noisy = replace_nouns(dataset, rate=rate, seed=1)
    changed = [old != new for old, new in zip(TEXTS, noisy["caption"], strict=True)]
    assert sum(changed) == round(rate * len(TEXTS))
    assert noisy["clean"] == [not value for value in changed]
    for old, new, differs in zip(TEXTS, noisy["caption"], changed, strict=True):
        if differs:
            ((before, after),) = differences(old, new)
            assert after.lower() in {*NOUNS, "beach", "street", "park", "house"} and before.lower() != after.lower()
            assert before[0].isupper() == after[0].isupper()


def test_the_article_fits_the_new_noun():
    noisy = replace_nouns(rows_of(TEXTS), rate=1.0)["caption"]
    texts = " ".join(noisy).lower()
    assert " an apple" in texts and " a apple" not in texts and " an dog" not in texts and " an man" not in texts


def test_plural_nouns_become_plural_ones():
    nouns = ["dogs", "girls", "people", "dress", "dog", "girl"]
    texts = [f"the {noun} in the {place}" for noun in nouns for place in ("snow", "park", "field") for _ in range(5)]
    noisy = replace_nouns(rows_of(texts), rate=1.0)["caption"]
    plurals = {"dogs", "girls", "people"}
    pairs = [pair for old, new in zip(texts, noisy, strict=True) for pair in differences(old, new)]
    assert len(pairs) == len(texts) and all((old in plurals) == (new in plurals) for old, new in pairs)


def test_no_caption_gets_a_noun_that_its_row_has():
    lists = [[f"a {noun} on the {place}" for noun in ("dog", "man")] for place in ("beach", "street", "park")] * 8
    lists += [["a horse in the field", "a ball"]] * 8
    noisy = replace_nouns(rows_of(lists), rate=0.8)
    for old, new, clean in zip(lists, noisy["captions"], noisy["clean"], strict=True):
        known = {word for text in old for word in text.split()}
        for before, after, truth in zip(old, new, clean, strict=True):
            assert (before == after) == truth
            assert truth or differences(before, after)[0][1] not in known
    assert sum(not value for row in noisy["clean"] for value in row) == round(0.8 * 64)


def test_the_seed_decides():
    first, second, other = (replace_nouns(rows_of(TEXTS), rate=0.5, seed=seed)["caption"] for seed in (3, 3, 4))
    assert list(first) == list(second) and list(first) != list(other)


def test_missing_captions_stay_missing():
    dataset = rows_of([*TEXTS, None, ""])
    noisy = replace_nouns(dataset, rate=0.5)
    assert noisy["caption"][-2:] == [None, ""] and noisy["clean"][-2:] == [True, True]


def test_known_mismatches_stay_mismatched():
    dataset = rows_of(TEXTS).add_column("clean", [False] * 10 + [True] * (len(TEXTS) - 10))
    noisy = replace_nouns(dataset, rate=0.2)
    assert noisy["clean"][:10] == [False] * 10 and 10 < noisy["clean"].count(False) <= 10 + round(0.2 * len(TEXTS))


@pytest.mark.parametrize(
    ("captions", "rate", "found"),
    [
        (["ein Hund im Schnee", "eine Frau am Strand"] * 20, 0.4, "0 nouns were found"),
        (["a dog in the park"] * 20, 0.4, "2 nouns were found"),
        ([*TEXTS, *["blue"] * 40], 0.9, "noise_kind: partial"),
    ],
)
def test_too_few_nouns_are_refused(captions, rate, found):
    with pytest.raises(ValueError, match=rf"noise_rate.*{found}.*lower rate, or noise_kind random"):
        replace_nouns(rows_of(captions), rate=rate)


def test_stored_features_of_captions_are_refused():
    dataset = rows_of(TEXTS).add_column("text_features", [[0.0]] * len(TEXTS))
    with pytest.raises(ValueError, match=r"data\.text_features.*would stay as they are"):
        replace_nouns(dataset, rate=0.2)


def test_scenes_through_a_recipe():
    splits = load_splits(scenes_train=100, scenes_validation=4, noise_rate=0.3, noise_kind="partial", noise_seed=5)
    captions = make_scenes(100)["caption"]
    changed = [old != new for old, new in zip(captions, splits["train"]["caption"], strict=True)]
    assert sum(changed) == 30 and splits["train"]["clean"] == [not value for value in changed]


def test_the_kinds_of_recipes_are_those_of_the_data():
    assert schema.NOISE_KINDS == noise_kinds.NOISE_KINDS == tuple(noise_kinds.CHANGES)
    assert (
        Recipe.from_dict({"name": "old", "data": {"noise_rate": 0.2}, "model": {"name_or_path": "m"}}).data.noise_kind
        == "random"
    )


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (("random", 0.4, 7, None), "40% of the training captions shuffled, seed 7"),
        (
            ("neighbours", 0.2, 0, None),
            "20% of the training captions exchanged between images that look alike, seed 0",
        ),
        (("partial", 0.6, 1, None), "60% of the training captions changed in one noun, seed 1"),
        (
            ("absent", 0.4, 2, None),
            "40% of the training captions replaced by those of images that were left out, seed 2",
        ),
        (("random", 0.0, 1, "o.npy"), "training captions in the order of a fixed permutation"),
        (("random", 0.0, 1, None), None),
    ],
)
def test_the_noise_in_words(given, text):
    assert describe_noise(*given) == text
