"""Names and forms of the weights of a model in open_clip and in transformers, translated in both directions."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from hf_dissect.models.open_clip.configuration import NotConvertible

_NOT_WEIGHTS = ("attn_mask", "position_ids")  # buffers that earlier versions saved
_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
_MLP = {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_TIMM_BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
_TIMM_MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


class Same(NamedTuple):
    """The same numbers under two names: one behind the other along the first dimension, where there are several.

    Attributes:
        open_clip: Names in open_clip, and the share of each in the whole.
        transformers: Names in transformers, of equal shares.
        transposed: True if rows are columns on the other side.
    """

    open_clip: dict[str, int]
    transformers: tuple[str, ...]
    transposed: bool = False


def list_weights(config: PreTrainedConfig, custom_text: bool) -> list[Same]:
    """List the weights of a `CLIPModel` or a `SiglipModel`.

    Args:
        config: Configuration of the model.
        custom_text: True if the text tower has a prefix of its own in open_clip.
    """
    is_siglip = config.model_type == "siglip"
    names = list(_list_siglip_vision(config) if is_siglip else _list_clip_vision(config))
    names += _list_text(config, "text." if custom_text else "", is_siglip)
    return [*names, _same("logit_scale", "logit_scale"), *([_same("logit_bias", "logit_bias")] if is_siglip else [])]


def _same(open_clip: str, transformers: str, transposed: bool = False) -> Same:
    return Same({open_clip: 1}, (transformers,), transposed)


def _list_layers(names: Mapping[str, str], source: str, target: str) -> Iterator[Same]:
    for name, other in names.items():
        for part in ("weight", "bias"):
            yield _same(f"{source}{name}.{part}", f"{target}{other}.{part}")


def _list_attention(weight: str, bias: str, target: str) -> Iterator[Same]:
    for name, part in ((weight, "weight"), (bias, "bias")):
        yield Same({name: 1}, tuple(f"{target}self_attn.{letter}_proj.{part}" for letter in "qkv"))


def _list_blocks(count: int, source: str, target: str) -> Iterator[Same]:
    for number in range(count):
        place, layer = f"{source}transformer.resblocks.{number}.", f"{target}encoder.layers.{number}."
        yield from _list_layers(_BLOCK | _MLP, place, layer)
        yield from _list_attention(f"{place}attn.in_proj_weight", f"{place}attn.in_proj_bias", layer)


def _list_clip_vision(config: Any) -> Iterator[Same]:
    embeddings = "vision_model.embeddings."
    yield _same("visual.class_embedding", f"{embeddings}class_embedding")
    yield _same("visual.positional_embedding", f"{embeddings}position_embedding.weight")
    yield _same("visual.conv1.weight", f"{embeddings}patch_embedding.weight")
    yield from _list_layers({"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}, "visual.", "vision_model.")
    yield from _list_blocks(config.vision_config.num_hidden_layers, "visual.", "vision_model.")
    yield _same("visual.proj", "visual_projection.weight", transposed=True)


def _list_siglip_vision(config: Any) -> Iterator[Same]:
    trunk, model = "visual.trunk.", "vision_model."
    yield _same(f"{trunk}pos_embed", f"{model}embeddings.position_embedding.weight")
    yield from _list_layers({"patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm"}, trunk, model)
    for number in range(config.vision_config.num_hidden_layers):
        place, layer = f"{trunk}blocks.{number}.", f"{model}encoder.layers.{number}."
        yield from _list_layers(_TIMM_BLOCK | _TIMM_MLP, place, layer)
        yield from _list_attention(f"{place}attn.qkv.weight", f"{place}attn.qkv.bias", layer)
    yield _same(f"{trunk}attn_pool.latent", f"{model}head.probe")
    for part in ("weight", "bias"):
        queries, others = f"{trunk}attn_pool.q.{part}", f"{trunk}attn_pool.kv.{part}"
        yield Same({queries: 1, others: 2}, (f"{model}head.attention.in_proj_{part}",))
    pool = {"proj": "attention.out_proj", "norm": "layernorm", **_TIMM_MLP}
    yield from _list_layers(pool, f"{trunk}attn_pool.", f"{model}head.")


def _list_text(config: Any, prefix: str, is_siglip: bool) -> Iterator[Same]:
    yield _same(f"{prefix}token_embedding.weight", "text_model.embeddings.token_embedding.weight")
    yield _same(f"{prefix}positional_embedding", "text_model.embeddings.position_embedding.weight")
    yield from _list_blocks(config.text_config.num_hidden_layers, prefix, "text_model.")
    yield from _list_layers({"ln_final": "final_layer_norm"}, prefix, "text_model.")
    if is_siglip:
        yield from _list_layers({"text_projection": "head"}, prefix, "text_model.")
    else:
        yield _same(f"{prefix}text_projection", "text_projection.weight", transposed=True)


def to_transformers(
    tensors: Mapping[str, torch.Tensor], config: PreTrainedConfig, shapes: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """Translate the weights of open_clip.

    Args:
        tensors: Weights by their names in open_clip.
        config: Configuration of the model of transformers.
        shapes: Shapes of the weights of that model, by name.

    Returns:
        Weights in float32, by their names in transformers.

    Raises:
        NotConvertible: Names or shapes are not those of the configuration.
    """
    names = list_weights(config, custom_text="text.token_embedding.weight" in tensors)
    expected = {name for same in names for name in same.open_clip}
    if missing := sorted(expected - tensors.keys()):
        raise NotConvertible(f"the weights lack {missing[0]}{_count(missing)}")
    left = sorted(name for name in tensors.keys() - expected if not name.endswith(_NOT_WEIGHTS))
    if left:
        raise NotConvertible(f"the weights have {left[0]}{_count(left)}, which the configuration does not speak of")
    translated = {}
    for same in names:
        whole = torch.cat([_at_least_1d(tensors[name]) for name in same.open_clip]).float()
        whole = whole.T if same.transposed else whole
        wanted = [shapes[name] for name in same.transformers]
        expected_shape = [len(wanted) * wanted[0][0], *wanted[0][1:]] if wanted[0] else []
        # Some have a dimension of 1 in one of the two libraries.
        if [side for side in whole.shape if side != 1] != [side for side in expected_shape if side != 1]:
            shown = [*reversed(expected_shape)] if same.transposed else expected_shape
            given = " and ".join(f"{name} {list(tensors[name].shape)}" for name in same.open_clip)
            raise NotConvertible(f"the weights have {given}, where the configuration asks for {shown}")
        for name, shape, part in zip(same.transformers, wanted, _split(whole, [1] * len(wanted)), strict=True):
            translated[name] = part.reshape(shape).contiguous()
    return translated


def to_open_clip(
    tensors: Mapping[str, torch.Tensor], config: PreTrainedConfig, context_length: int
) -> dict[str, torch.Tensor]:
    """Translate the weights of transformers.

    Args:
        tensors: Weights by their names in transformers.
        config: Configuration of the model.
        context_length: Number of positions that open_clip's text tower keeps.
    """
    is_siglip, translated = config.model_type == "siglip", {}
    for same in list_weights(config, custom_text=is_siglip):
        whole = torch.cat([_at_least_1d(tensors[name]) for name in same.transformers]).detach().cpu().float()
        whole = whole.T if same.transposed else whole
        for name, part in zip(same.open_clip, _split(whole, [*same.open_clip.values()]), strict=True):
            translated[name] = part.contiguous().clone()
    for name in ("logit_scale", "logit_bias"):
        if name in translated:
            translated[name] = translated[name].reshape(())
    if is_siglip:
        translated["visual.trunk.pos_embed"] = translated["visual.trunk.pos_embed"][None]
    positions = "text.positional_embedding" if is_siglip else "positional_embedding"
    translated[positions] = translated[positions][:context_length].clone()
    return translated


def _split(whole: torch.Tensor, shares: list[int]) -> tuple[torch.Tensor, ...]:
    share = whole.shape[0] // sum(shares)
    return (whole,) if len(shares) == 1 else whole.split([share * part for part in shares])


def _at_least_1d(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(1) if tensor.dim() == 0 else tensor


def _count(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
