"""Replace one noun of a caption, so that the caption is wrong in one word and fits in all others."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set

import numpy as np
import pyarrow as pa
from datasets import Dataset

from hf_dissect.data.arrow_columns import is_list, lay_out_like, read_column, replace_column
from hf_dissect.data.noise import check_rate_and_seed, find_caption_column, find_row_of_pair, record_truth
from hf_dissect.data.pair_columns import TEXT_FEATURES_COLUMN

_DETERMINERS = frozenset(
    """
    a an the one two three four five six seven eight nine ten some several many few his her its their my your our this
    that these those another each every both
    """.split()
)
_AFTER_A_PHRASE = frozenset(
    """
    in on at of with by to from for into onto over under above below behind near next through across along around
    between against up down off inside outside toward towards while as is are was were has have having which who be
    being during out left right before after
    """.split()
)
"""Words that follow a whole noun phrase, and hardly ever stand within one."""
_NOT_SHOWN = frozenset(
    "other same top bottom middle centre center side front back end edge background lot couple pair".split()
)
"""Words that stand where nouns do, and name nothing that a picture shows."""
_PLURALS = frozenset("people men women children".split())
_TOKEN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|[.,;:!?]")
_ENDS = frozenset(".;:!?")
_LEAST_TIMES = 5
_LEAST_CLOSING = 0.25
_LEAST_IN_PHRASES = 0.2
_LEAST_NOUNS = 5
_TRIES = 20

Place = tuple[int, int, str]
"""Start and end of a word in its caption, and the word in lower case."""


def replace_nouns(
    dataset: Dataset,
    *,
    rate: float,
    seed: int = 0,
    caption_column: str | None = None,
    clean_column: str | None = None,
) -> Dataset:
    """Replace one noun in a share of the captions by a noun of another caption, and record which captions these are.

    Exactly `round(rate * num_pairs)` captions are changed, each in one word ("a dog in the snow" becomes "a man in the
    snow"). The new noun is drawn as often as captions use it, is in none of the captions of the row, and is a plural
    (ends in an s, or is one of four others) if the old one is. An `a` or `an` in front of it is put right.

    A noun is a word that stands at least 5 times, and one time in five that it occurs, at the end of a phrase of
    determiner and adjectives, and is followed there by a preposition, a form of "to be" or the end of the sentence at
    least one time in four. An adjective is a word that follows determiners as often and is less often followed so.
    Nouns are replaced, and drawn, where they stand in such a phrase. The rule is made for English captions. It takes
    some words for nouns that are none, and does not know that two nouns may mean the same.

    Args:
        dataset: Rows with a caption (string) or a list of captions.
        rate: Share of the captions to change, in [0, 1].
        seed: The same seed gives the same noise.
        caption_column: Column with the captions, see `shuffle_captions`.
        clean_column: Column for the truth, see `shuffle_captions`.

    Returns:
        The dataset with the changed captions and the truth, see `shuffle_captions`.

    Raises:
        ValueError: If fewer captions have a noun than are to be changed, or the captions are stored features.
    """
    check_rate_and_seed(rate, seed)
    column = find_caption_column(dataset, caption_column)
    if TEXT_FEATURES_COLUMN in dataset.column_names:
        raise ValueError(
            "noise_kind partial (data.noise_kind) changes the words of captions, but the model reads stored features "
            "of them (data.text_features), which would stay as they are. Leave data.text_features out, or use "
            "noise_kind random, neighbours or absent."
        )
    captions = read_column(dataset, column)
    row_of_pair = find_row_of_pair(captions)
    texts = [text or "" for text in (captions.flatten() if is_list(captions.type) else captions).to_pylist()]
    changed = _change(texts, row_of_pair, round(rate * len(texts)), np.random.default_rng(seed))
    truth = np.array([number not in changed for number in range(len(texts))], dtype=bool)
    kind = captions.type.value_type if is_list(captions.type) else captions.type
    flat = captions.flatten() if is_list(captions.type) else captions
    given = [changed.get(number, text) for number, text in enumerate(flat.to_pylist())]
    moved = lay_out_like(captions, pa.array(given, kind))
    replaced = replace_column(dataset, column, moved, dataset.features[column])
    return record_truth(replaced, captions, truth, np.arange(len(texts)), clean_column)


def find_nouns(captions: Sequence[str]) -> list[list[Place]]:
    """Return the nouns of each caption that stand in a phrase with a determiner, by the rule of `replace_nouns`."""
    tokens = [
        [(match.start(), match.end(), match.group().lower()) for match in _TOKEN.finditer(caption)]
        for caption in captions
    ]
    count, closing = _count_heads(tokens, frozenset())
    often = {word for word, times in count.items() if times >= _LEAST_TIMES}
    adjectives = {word for word in often if closing[word] < _LEAST_CLOSING * count[word]}
    count, closing = _count_heads(tokens, adjectives)
    total = Counter(word for words in tokens for _, _, word in words)
    nouns = {
        word
        for word, times in count.items()
        if times >= max(_LEAST_TIMES, _LEAST_IN_PHRASES * total[word])
        and closing[word] >= _LEAST_CLOSING * times
        and word not in _NOT_SHOWN
    }
    return [[words[head] for head in _find_heads(words, adjectives) if words[head][2] in nouns] for words in tokens]


def _count_heads(tokens: Sequence[Sequence[Place]], adjectives: Set[str]) -> tuple[Counter[str], Counter[str]]:
    """Count how often each word follows a determiner and adjectives, and how often the phrase ends with it there."""
    count: Counter[str] = Counter()
    closing: Counter[str] = Counter()
    for words in tokens:
        for head in _find_heads(words, adjectives):
            after = words[head + 1][2] if head + 1 < len(words) else "."
            count[words[head][2]] += 1
            closing[words[head][2]] += after in _AFTER_A_PHRASE or after in _ENDS
    return count, closing


def _find_heads(words: Sequence[Place], adjectives: Set[str]) -> Iterator[int]:
    """Yield the position of the first word after each determiner that is not an adjective."""
    for place, (_, _, word) in enumerate(words):
        if word in _DETERMINERS:
            head = place + 1
            while head < len(words) and words[head][2] in adjectives:
                head += 1
            if head < len(words) and words[head][2][0].isalpha():
                if words[head][2] not in _DETERMINERS | _AFTER_A_PHRASE:
                    yield head


def _change(texts: Sequence[str], row_of_pair: np.ndarray, count: int, rng: np.random.Generator) -> dict[int, str]:
    """Return `count` changed captions by their number."""
    if count == 0:
        return {}
    places = find_nouns(texts)
    used = [noun for found in places for _, _, noun in found]
    num_nouns = len(set(used))
    forms = {plural: [noun for noun in used if _is_plural(noun) == plural] for plural in (False, True)}
    of_row: dict[int, set[str]] = {}
    for row, text in zip(row_of_pair.tolist(), texts, strict=True):
        of_row.setdefault(row, set()).update(token.lower() for token in _TOKEN.findall(text))
    changed: dict[int, str] = {}
    if num_nouns >= _LEAST_NOUNS:
        for number in rng.permutation(len(texts)).tolist():
            if len(changed) == count:
                break
            new = _replace_one(texts[number], places[number], forms, of_row[int(row_of_pair[number])], rng)
            if new is not None:
                changed[number] = new
    if len(changed) < count:
        raise ValueError(
            f"rate (noise_rate): {count} of {len(texts)} captions are to have a noun replaced (noise_kind: partial), "
            f"but only {len(changed)} can: {num_nouns} nouns were found, in {sum(map(bool, places))} captions. The "
            f"rule needs English captions and at least {_LEAST_NOUNS} nouns that occur {_LEAST_TIMES} times. Use a "
            "lower rate, or noise_kind random."
        )
    return changed


def _replace_one(
    text: str, places: Sequence[Place], forms: dict[bool, list[str]], known: set[str], rng: np.random.Generator
) -> str | None:
    """Return the caption with one of its nouns replaced by one that its row does not have; None if none is found."""
    for place in rng.permutation(len(places)).tolist():
        start, end, noun = places[place]
        choice = forms[_is_plural(noun)]
        for drawn in rng.integers(len(choice), size=_TRIES).tolist():
            if choice[drawn] not in known:
                return _put_in(text, start, end, choice[drawn])
    return None


def _put_in(text: str, start: int, end: int, noun: str) -> str:
    """Return the caption with a noun put in, written as the old one was, and with the article that fits."""
    before, old = text[:start], text[start:end]
    if old.isupper() and len(old) > 1:
        noun = noun.upper()
    elif old[0].isupper():
        noun = noun[0].upper() + noun[1:]
    if article := re.search(r"\b([aA])n?(\s+)$", before):
        fitting = article[1] + ("n" if noun[0].lower() in "aeiou" else "")
        before = before[: article.start()] + fitting + article[2]
    return before + noun + text[end:]


def _is_plural(noun: str) -> bool:
    return noun in _PLURALS or (noun.endswith("s") and not noun.endswith("ss"))
