"""Parts of `benchmarks/gpu.py` that use trainers: the peers, torch_compile, and cheaper pictures."""

from dataclasses import fields
from typing import Any

import peer_steps
import torch
from gpu_run import MadePictures, Run
from peer_steps import NotInstalled, Pairs, Turns

from hf_dissect import DissectTrainingArguments
from hf_dissect.losses import ContrastiveLoss

WARM_UP = 2


def _measure_arms(run: Run, arms: dict[str, Turns], warm_up: int = WARM_UP) -> dict[str, Any]:
    try:
        return run.take_turns({name: arm.step for name, arm in arms.items()}, warm_up)
    finally:
        for arm in arms.values():
            arm.close()


def measure_peers(run: Run) -> dict[str, Any]:
    """Measure a step of the trainers of `benchmarks/peers.py` on the same pairs."""
    size, batch = run.name_size("ViT-B/32"), run.candidates[0] if run.tiny else 512
    pairs, arms, missing = Pairs(size, 4 * batch, run.device), {}, {}
    for name in peer_steps.ARMS:
        try:
            arms[name] = peer_steps.make_arm(name, size, pairs, batch, 1000, run.device, torch.get_num_threads())
        except NotInstalled as error:
            missing[name] = str(error)
    return {"size": size, "batch": batch, **_measure_arms(run, arms), "not measured": missing}


def _make_own(run: Run, size: str, pairs: Pairs, batch: int, **settings: Any) -> Turns:
    selection = {"selection_strategy": "none"}
    train = peer_steps.prepare_own(size, pairs, batch, 1000, run.device, **selection, **settings)
    return Turns(train, torch.get_num_threads(), run.device)


def measure_compile(run: Run) -> dict[str, Any]:
    """Measure a step of DissectTrainer with and without torch_compile; the first steps, which compile, apart."""
    size, batch = run.name_size("ViT-B/32"), run.candidates[0] if run.tiny else 512
    pairs = Pairs(size, 4 * batch, run.device)
    compiled: dict[str, Any] = {"torch_compile": True}
    if run.tiny:
        compiled["torch_compile_backend"] = "aot_eager"  # the default backend compiles C++ for minutes
    arms = {"plain": _make_own(run, size, pairs, batch), "compiled": _make_own(run, size, pairs, batch, **compiled)}
    try:
        first = {name: round(sum(run.measure(arm.step)[0] for _ in range(WARM_UP)), 2) for name, arm in arms.items()}
    except BaseException:
        for arm in arms.values():
            arm.close()
        raise
    figures = _measure_arms(run, arms, warm_up=1)
    return {"size": size, "batch": batch, **figures, f"seconds_of_the_first_{WARM_UP}_steps": first}


def measure_pictures(run: Run) -> dict[str, Any]:
    """Measure a step with half of the patches, and one on pictures of half the side."""
    size, batch = run.name_size("ViT-B/16"), run.candidates[0] if run.tiny else 512
    pairs = Pairs(size, 2 * batch, run.device)
    known = {field.name for field in fields(DissectTrainingArguments)}
    arms = {"plain": _make_own(run, size, pairs, batch)}
    missing = {}
    if "patch_dropout" in known:
        arms["patch_dropout 0.5"] = _make_own(run, size, pairs, batch, patch_dropout=0.5)
    else:
        missing["patch_dropout"] = "this version has no such setting"
    figures = _measure_arms(run, arms)

    # What data.image_size does to the step, without reading pictures: the model interpolates its positions.
    model = peer_steps.make_model(size).to(run.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    whole, loss = MadePictures(run, size).take(list(range(batch))), ContrastiveLoss()
    half = {**whole, "pixel_values": whole["pixel_values"][:, :, ::2, ::2].contiguous()}

    def train(inputs: dict[str, torch.Tensor], **options: Any) -> None:
        with run.autocast():
            value = loss(model(**inputs, **options))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = {"whole side": lambda: train(whole), "half side": lambda: train(half, interpolate_pos_encoding=True)}
    figures |= run.take_turns(steps)
    return {"size": size, "batch": batch, **figures, "not measured": missing}
