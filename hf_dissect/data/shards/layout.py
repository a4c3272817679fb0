"""Choose the columns of the rows by what the samples have, and refuse shards that do not make pairs."""

import logging
from collections.abc import Mapping, Sequence

from hf_dissect.data.shards.columns import (
    IMAGE_MEMBERS,
    JSON_CAPTIONS,
    JSON_COLUMN,
    KEY_COLUMN,
    LABEL_FIELDS,
    Layout,
    choose_type,
    list_names,
)
from hf_dissect.data.shards.skipped import describe_all_skipped
from hf_dissect.data.shards.survey import Asked, NamedSurveys, Survey

logger = logging.getLogger(__name__)


def choose_layout(
    path: str,
    surveys: NamedSurveys,
    asked: Asked,
    required: Sequence[str],
    skipped: Mapping[str, str],
    *,
    streaming: bool,
) -> Layout:
    """Choose the columns of the rows.

    Args:
        path: Path of the shards, for messages.
        surveys: Surveys of all samples, or of the first ones of a stream.
        asked: Settings that name members or fields.
        required: Fields of which every sample needs a value.
        skipped: Shards that were not read to their end, with the reason, for messages.
        streaming: Whether the rows are a stream, which has the fields that were asked for and the others as text.

    Raises:
        ValueError: If there are no samples, pictures never meet captions, or what was asked for is not there.
    """
    survey, at_last_dot = surveys.better
    _check_pairs(path, survey, asked, describe_all_skipped(skipped))
    image = asked.image or "image"
    member: str | None = None
    if asked.image_name is not None:
        member = asked.image_name.lower() if asked.image_name.lower() in survey.members else ""
    several = survey.lists > 0 or asked.caption == "captions"
    caption = (asked.caption or ("captions" if several else "caption")) if survey.captions else None
    types = {name: choose_type(set(kinds)) for name, kinds in survey.kinds.items()}
    for name in required:
        if types.get(name) is None:
            found = "nested values" if "nested" in survey.kinds.get(name, ()) else "no values"
            raise ValueError(
                f"data.path {path!r}: {found} in {name!r}, which a setting names; the samples have "
                f"{list_names(survey.members, survey.kinds)}. Name one of these."
            )
    taken = {KEY_COLUMN, JSON_COLUMN, caption, *(JSON_CAPTIONS if asked.caption is None else ())} - set(required)
    if member != "":
        taken.add(image)
    # A truth that nobody asked for and that not every sample has would only stop the run.
    truths = [name for name in asked.truths if name not in survey.without and types.get(name) in ("bool", "int64")]
    taken |= {*asked.truths} - {*truths, *required}
    wanted = [name for name in types if name not in taken]
    if streaming:
        required = [*required, *(name for name in truths if name not in required)]
        shown = {*required, *LABEL_FIELDS, *([image] if member == "" else [])}
        wanted = [name for name in wanted if name in shown]
    return Layout(
        image=image,
        image_member=member,
        caption=caption,
        asked_caption=asked.caption,
        several=several,
        fields=tuple((name, kind) for name in wanted if (kind := types[name]) is not None),
        required=tuple(required) if streaming else (),
        truths=tuple(truths),
        has_json=streaming and "json" in survey.members,
        at_last_dot=at_last_dot,
    )


def check_complete(surveys: NamedSurveys, required: Sequence[str]) -> None:
    """Check that every sample has the fields that settings name.

    Raises:
        ValueError: If one does not; the message names field, shard and key.
    """
    survey, _ = surveys.better
    for name in required:
        if name in survey.without:
            shard, key = survey.without[name]
            raise ValueError(
                f"Sample {key!r} of {shard!r} has no value {name!r}, which a setting names and other samples have. "
                "Add it, or name another column."
            )


def warn_of_choices(path: str, surveys: NamedSurveys, asked: Asked, layout: Layout) -> None:
    """Warn of what is read in one of several possible ways or not at all."""
    survey, at_last_dot = surveys.better
    for name in asked.truths:
        if name in survey.kinds and name not in layout.features:
            logger.warning(
                "%s: the field %r is left out, since it is not true or false in every sample, as the truth would be.",
                *(path, name),
            )
    if at_last_dot:
        logger.warning(
            "%s: names of members are split at their last dot, which gives %d pairs; the first dot, the rule of "
            "WebDataset, gives %d.",
            *(path, survey.pairs, surveys.first_dot.pairs),
        )
    if survey.hidden_lists:
        logger.warning(
            "%s: %d samples have a text member and a list of captions in the JSON; the text member is taken. Set "
            "data.caption_column to the name of the JSON field to take the list.",
            *(path, survey.hidden_lists),
        )
    if survey.links:
        logger.warning("%s: %d members are links, which hold no data and are not read.", path, survey.links)


def _check_pairs(path: str, survey: Survey, asked: Asked, skipped: str) -> None:
    names = list_names(survey.members, survey.kinds)
    links = f" {survey.links} members are links: write the shards with tar --dereference." if survey.links else ""
    if not survey.samples:
        raise ValueError(
            f"data.path {path!r} holds no samples. A shard holds members such as 000.jpg and 000.txt.{skipped}{links}"
        )
    if not survey.images:
        wanted = f"no image member ({', '.join(IMAGE_MEMBERS)})"
        if asked.image_name is not None:
            wanted = f"no picture {asked.image!r}, which data.image_column names"
        raise ValueError(f"data.path {path!r} holds {wanted}, only {names}.{skipped}{links}")
    if asked.caption is not None and not survey.captions:
        raise ValueError(
            f"data.caption_column {asked.caption!r}: no sample of {path!r} has a caption of this name; they have "
            f"{names}. Name one of these, or leave it out."
        )
    if survey.captions and not survey.pairs:
        (image_shard, image), (caption_shard, caption) = survey.first["picture"], survey.first["caption"]
        raise ValueError(
            f"data.path {path!r}: pictures and captions never meet. {survey.images} samples have a picture, the first "
            f"is {image!r} in {image_shard!r}, and {survey.captions} have a caption, the first is {caption!r} in "
            f"{caption_shard!r}; they have {names}. The members of a sample have the same name up to the first dot "
            "and are next to each other: name them so, and write the shards again in the order of the names "
            f"(tar --sort=name).{links}"
        )
