"""Settings on the command line that are nearly `section.key=value`, and how they are written."""

import re
from collections.abc import Collection, Sequence

_KEY = r"[A-Za-z_]\w*(?:\.\w+)+"


def correct_settings(words: Sequence[str], known: Collection[str] | None = None) -> str | None:
    """Return how a setting is written that stands on a command line in another form; None if there is none.

    Such as `selection.ratio 0.3`, `--selection.ratio=0.3`, `selection.ratio = 0.3`, or `selection.ratio: 0.3`.

    Args:
        words: Words of the command line after the name of the command.
        known: Keys that may be meant; None for any, where no other word looks like one.
    """
    for place, word in enumerate(words):
        match = re.fullmatch(rf"(-*)({_KEY})\s*([=:]?)(.*)", word, re.DOTALL)
        if match is None or "/" in word.partition("=")[0] or word.endswith((".yaml", ".yml", ".json")):
            continue
        dashes, key, sign, value = match.groups()
        if known is not None and key not in known:
            continue
        if not sign and value:  # not a key, such as a file with a dash in its name
            continue
        if not dashes and sign == "=" and (value or not _is_value(words, place + 1)):
            continue
        value = value.strip() or _find_value(words[place + 1 :])
        if value is None:
            continue
        return f"{key}: write {key}={value}, as one word with = and without dashes or spaces"
    return None


def suggest_setting(words: Sequence[str], sections: Collection[str] | None = None) -> str | None:
    """Return the setting that an unknown option such as `--learning_rate 0.3` means; None if it means none.

    Args:
        words: Unknown words of the command line.
        sections: Sections of a recipe that the command takes settings of; None for all.
    """
    match = re.fullmatch(r"--?([A-Za-z_]\w*)(?:=(.*))?", words[0].replace("-", "_").replace("__", "--", 1))
    if match is None:
        return None
    from hf_dissect.recipe.places import list_places
    from hf_dissect.recipe.recipe import Recipe

    places = [
        place
        for place in list_places(Recipe.sections()).get(match[1], ())
        if sections is None or place.partition(".")[0] in sections
    ]
    value = words[0].partition("=")[2] or (words[1] if len(words) > 1 else "VALUE")
    meant = " or ".join(f"{place}={value}" for place in places)
    return (
        f"{words[0]}: no such option; settings are written without dashes, with their section: {meant}"
        if meant
        else None
    )


def _is_value(words: Sequence[str], place: int) -> bool:
    return place < len(words) and not words[place].startswith("--") and "=" not in words[place]


def _find_value(words: Sequence[str]) -> str | None:
    """Return the value that the next words give, after a sign of its own or glued to it."""
    for word in words[:2]:
        value = re.sub(r"^[=:]", "", word)
        if word.startswith("--") or re.match(_KEY + "=", word):
            return None
        if value:
            return value
    return None
