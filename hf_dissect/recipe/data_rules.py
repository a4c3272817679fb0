"""Checks of a recipe's data, adapter and evaluation against the settings they must agree with."""

import codecs
from collections.abc import Iterator, Mapping
from typing import Any

from hf_dissect.recipe.fields import training_value
from hf_dissect.recipe.rules import Fault
from hf_dissect.recipe.schema import DataSection, EvaluationSection, ZeroShotSection
from hf_dissect.settings import show


def adapter_conflicts(adapter: Mapping[str, Any] | None, data: DataSection) -> Iterator[Fault]:
    """Yield the faults of an adapter and its tasks."""
    adapter = adapter or {}
    routed_by_task = adapter.get("type") == "mola" and adapter.get("variant") == "grad"
    if routed_by_task and adapter.get("default_task") is None and data.task_column is None:
        yield (
            ("data.task_column", "adapter"),
            "missing; adapter.variant grad trains an expert for each task and needs the column that tells it",
        )


def data_conflicts(data: DataSection, training: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the faults of source, path and streaming."""
    if data.source == "scenes" and data.path:
        yield (
            ("data.path", "data.source"),
            f"{show(data.path)} would not be read: data.source is scenes; "
            "set data.source to hub, folder, imagefolder or webdataset, or data.path to null",
        )
    if data.source != "scenes" and not data.path:
        yield ("data.path", "data.source"), f"missing; data.source {data.source} needs one (data.path=...)"
    if data.name and data.source != "hub":
        yield ("data.name", "data.source"), f"{show(data.name)} is only for data.source hub, not {data.source}"
    if data.streaming and training_value(training, "max_steps") <= 0:
        yield (
            ("data.streaming", "training.max_steps"),
            "true needs training.max_steps: the length of a stream is unknown, hence that of an epoch",
        )
    if data.source == "webdataset" and "://" in (data.path or "") and not data.streaming:
        yield (
            ("data.streaming", "data.path"),
            f"false, but the shards of {show(data.path)} lie elsewhere; set it to true, or copy them here first",
        )
    if data.skip_bad_shards and data.source != "webdataset":
        yield (
            ("data.skip_bad_shards", "data.source"),
            f"true is only for data.source webdataset, not {data.source}; set it to false",
        )
    for name in ("image_features", "text_features"):
        if data.streaming and getattr(data, name):
            yield (
                (f"data.{name}", "data.streaming"),
                f"{show(getattr(data, name))} needs rows in a fixed order; set data.streaming to false",
            )


def reading_conflicts(data: DataSection) -> Iterator[Fault]:
    """Yield the faults of how files are read, and of settings that the source does not read."""
    yield from _source_conflicts(data, "data")
    if data.image_root is not None and data.source == "hub" and data.streaming:
        yield (
            ("data.image_root", "data.streaming"),
            f"{show(data.image_root)} needs the rows at hand; set data.streaming to false, or leave it out",
        )
    if "{}" not in data.class_template and "{class}" not in data.class_template:
        yield (
            ("data.class_template",),
            f"{show(data.class_template)} is not allowed; allowed: text with {{}} or {{class}} for the class",
        )


def _source_conflicts(section: DataSection | ZeroShotSection, where: str) -> Iterator[Fault]:
    """Yield the faults of separator, encoding and folder of pictures, of the section `where`."""
    local = ("folder", "imagefolder")
    for name, sources in (("separator", local), ("encoding", local), ("image_root", (*local, "hub"))):
        value = getattr(section, name)
        if value is not None and section.source not in sources:
            yield (
                (f"{where}.{name}", f"{where}.source"),
                f"{show(value)} is only for {where}.source {', '.join(sources)}, not {section.source}; leave it out",
            )
    if section.separator is not None and not _is_separator(section.separator):
        yield (
            (f"{where}.separator",),
            f"{show(section.separator)} is not allowed; allowed: one character, such as ';', or tab",
        )
    if section.encoding is not None and not _is_encoding(section.encoding):
        yield (
            (f"{where}.encoding",),
            f"{show(section.encoding)} is not allowed; allowed: utf-8, cp1252, latin-1, utf-16 or another text "
            "encoding that Python knows",
        )


def noise_conflicts(data: DataSection) -> Iterator[Fault]:
    """Yield the faults of captions that are made wrong on purpose."""
    if data.noise_kind != "random":
        yield from _noise_kind_conflicts(data)
    if data.noise_rate and data.noise_permutation:
        yield (
            ("data.noise_permutation", "data.noise_rate"),
            f"{show(data.noise_permutation)} and data.noise_rate {data.noise_rate} are both set; "
            "set data.noise_rate to 0 or data.noise_permutation to null",
        )
    if data.streaming and (data.noise_rate or data.noise_permutation):
        key = "data.noise_rate" if data.noise_rate else "data.noise_permutation"
        value = data.noise_rate or data.noise_permutation
        yield (
            (key, "data.streaming"),
            f"{show(value)} needs all captions at once; set data.streaming to false, or leave the captions alone",
        )


def _noise_kind_conflicts(data: DataSection) -> Iterator[Fault]:
    kind = show(data.noise_kind)
    if data.noise_permutation:
        yield (
            ("data.noise_kind", "data.noise_permutation"),
            f"{kind} and data.noise_permutation {show(data.noise_permutation)} are both set; set data.noise_kind to "
            "random (the file says which captions are exchanged) or data.noise_permutation to null",
        )
    elif not data.noise_rate:
        yield (
            ("data.noise_kind", "data.noise_rate"),
            f"{kind} would change no caption: data.noise_rate is 0; set it to the share of captions to change, or "
            "data.noise_kind to random",
        )
    if data.noise_kind == "neighbours" and not data.image_features and data.source not in ("hub", "folder"):
        yield (
            ("data.noise_kind", "data.image_features"),
            f"{kind} needs stored features of the images; name a .npz file with data.image_features, or an order of "
            "the captions that you made yourself with data.noise_permutation",
        )
    if data.noise_kind == "partial" and data.text_features:
        yield (
            ("data.noise_kind", "data.text_features"),
            f"{kind} changes words, but data.text_features {show(data.text_features)} would stay as they are; set "
            "data.noise_kind to random, neighbours or absent, or data.text_features to null",
        )


def evaluation_conflicts(
    evaluation: EvaluationSection, data: DataSection, training: Mapping[str, Any]
) -> Iterator[Fault]:
    """Yield the faults of an evaluation and its splits."""
    if evaluation.batch_size is not None and "per_device_eval_batch_size" in training:
        yield (
            ("evaluation.batch_size", "training.per_device_eval_batch_size"),
            f"{evaluation.batch_size} and training.per_device_eval_batch_size are both set; keep one",
        )
    if evaluation.retrieval and not data.validation_split and not data.test_split:
        yield (
            ("evaluation.retrieval", "data.validation_split", "data.test_split"),
            "true needs data.validation_split or data.test_split; set it to false",
        )
    if training.get("eval_strategy", "no") != "no" and not data.validation_split:
        yield (
            ("training.eval_strategy", "data.validation_split"),
            f"{show(training['eval_strategy'])} needs data.validation_split; set it to 'no'",
        )


def zero_shot_conflicts(zero_shot: ZeroShotSection | None, data: DataSection) -> Iterator[Fault]:
    """Yield the faults of classes, templates and source of a zero-shot classification."""
    where = "evaluation.zero_shot"
    if zero_shot is None:
        return
    if not zero_shot.classes or not all(name.strip() for name in zero_shot.classes):
        yield (f"{where}.classes",), f"{show(zero_shot.classes)} is not allowed; allowed: at least one class name"
    elif len(set(zero_shot.classes)) < len(zero_shot.classes):
        yield (f"{where}.classes",), f"{show(zero_shot.classes)} is not allowed; allowed: each class name once"
    if not zero_shot.templates:
        yield (f"{where}.templates",), "[] is not allowed; allowed: at least one, such as 'a photo of a {}.'"
    for template in zero_shot.templates:
        if not _is_template(template):
            yield (
                (f"{where}.templates",),
                f"{show(template)} is not allowed; allowed: text with {{}} for the class name",
            )
    if bool(zero_shot.source) != bool(zero_shot.path):
        given, missing = ("source", "path") if zero_shot.source else ("path", "source")
        yield (
            (f"{where}.{missing}", f"{where}.{given}"),
            f"missing; {where}.{given} is {show(getattr(zero_shot, given))} and needs it",
        )
    yield from _source_conflicts(zero_shot, where)
    if not zero_shot.source and not zero_shot.path and data.source != "scenes":
        yield (
            (f"{where}.path", f"{where}.source", "data.source"),
            f"missing; only data.source scenes brings labelled images of its own, not {data.source}",
        )


def _is_separator(separator: str) -> bool:
    return separator in ("tab", "\\t") or (len(separator) == 1 and separator not in '"\r\n\0')


def _is_encoding(encoding: str) -> bool:
    try:
        "".encode(encoding)
        return bool(codecs.lookup(encoding))
    except (LookupError, ValueError):
        return False


def _is_template(template: str) -> bool:
    try:
        return "{}" in template and "class name" in template.format("class name")
    except (KeyError, IndexError, ValueError):
        return False
