"""The adapted form of `torch.nn.MultiheadAttention`, which reads the weights of its projections without a call."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_dissect.mola.config import MolaConfig
from hf_dissect.mola.layer import LAYERS, Linear, MolaLayer
from hf_dissect.mola.routing import Routing

_READ_BY_OTHERS = (
    *("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn", "merge_masks"),
    *("in_proj_weight", "in_proj_bias", "out_proj", "bias_k", "bias_v", "_qkv_same_embed_dim"),
)
_FUSED = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


class MultiheadAttention(Linear):
    """MoLA in the input and the output projection of `torch.nn.MultiheadAttention`.

    `mola_A` and `mola_B`, `(E, r, embed)` and `(E, 3 * embed, r)`, add to the weight that projects to queries, keys
    and values. The output projection is a [`Linear`] layer of its own, as in PEFT's LoRA. The base layer is not
    called while an adapter is active, because its weights are common to all samples. The other steps are those of
    `torch.nn.functional.multi_head_attention_forward`.

    Args:
        base_layer: Attention to adapt.
        routing: Source of the experts' weights, shared by all layers of a model.
        tower: Name of the tower that the layer belongs to.

    Raises:
        TypeError: If another PEFT method has wrapped the attention, or its class computes differently.
        ValueError: If keys or values have a size or a bias of their own.
    """

    is_dense = False

    def __init__(self, base_layer: nn.Module, routing: Routing, tower: str) -> None:
        _check_attention(base_layer)
        super().__init__(base_layer, routing, tower)
        attention = self._get_attention()
        attention.out_proj = cast(Any, Linear(attention.out_proj, routing, tower))

    def __getattr__(self, name: str) -> Any:
        # Modules around it read these of an attention.
        return getattr(self._get_attention(), name) if name in _READ_BY_OTHERS else super().__getattr__(name)

    def update_layer(self, adapter_name: str, r: int, alpha: float, config: MolaConfig) -> None:
        """Add the experts of one adapter to both projections.

        Args:
            adapter_name: Name of the adapter.
            r: Rank of its experts in this layer.
            alpha: Numerator of the factor of the experts.
            config: Configuration of the adapter.
        """
        super().update_layer(adapter_name, r, alpha, config)
        out_proj = self._get_out_proj()
        for part in (self, out_proj):  # the attention itself knows it, whatever the modules around it say
            part.batch_dim, part.knows_batch_dim = 0 if self._get_attention().batch_first else 1, True
        out_proj._active_adapter, out_proj._disable_adapters = self._active_adapter, self._disable_adapters
        out_proj.update_layer(adapter_name, r, alpha, config)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.MultiheadAttention:
        """Return the attention without its adapters.

        Args:
            merge: Add the experts of the fixed task to both weights first.
            safe_merge: Check that the merged weights are finite.
            adapter_names: Adapters to merge; None for the active ones.
        """
        attention, out_proj = self._get_attention(), self._get_out_proj()
        if merge:
            self.merge(safe_merge, adapter_names)
            out_proj.merge(safe_merge, adapter_names)
        attention.out_proj = cast(Any, out_proj.get_base_layer())
        return attention

    def forward(  # type: ignore[override]  # the arguments of torch's attention
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the attention with the adapted projections.

        Args:
            query: Queries `(B, L, embed)`, or `(L, B, embed)` without `batch_first`, or `(L, embed)` of one sample.
            key: Keys of `S` positions, in the same order.
            value: Values of the same shape.
            key_padding_mask: True or a number to add for each key, `(B, S)`.
            need_weights: Return the attention weights as well.
            attn_mask: True or a number to add for each query and key, `(L, S)` or `(B * heads, L, S)`.
            average_attn_weights: Average these weights over the heads.
            is_causal: Hint that `attn_mask` is the causal mask.

        Returns:
            Output in the shape of the queries, and the attention weights `(B, L, S)` or `(B, heads, L, S)`, or None.
        """
        if self._equals_base():
            masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
            options = {"average_attn_weights": average_attn_weights, "is_causal": is_causal}
            return self.base_layer(query, key, value, need_weights=need_weights, **masks, **options)
        attention = self._get_attention()
        unbatched = query.dim() == 2
        if unbatched:
            inputs = {id(x): x.unsqueeze(self.batch_dim) for x in (query, key, value)}
            query, key, value = (inputs[id(x)] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = (self._split_heads(x) for x in self._project(query, key, value))
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True needs the causal attn_mask as well, as in torch.nn.MultiheadAttention.")
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _join_masks(attn_mask, key_padding_mask, q, k)
        dropout = attention.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q / math.sqrt(q.shape[-1]) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            output = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        output = output.transpose(1, 2) if attention.batch_first else output.permute(2, 0, 1, 3)
        output = attention.out_proj(output.flatten(2))
        if unbatched:
            return output.squeeze(self.batch_dim), None if weights is None else weights.squeeze(0)
        return output, weights

    def _equals_base(self) -> bool:
        """Return True if torch's own forward, which reads both weights, gives the result."""
        parts = (self, self._get_out_proj())
        if self.disable_adapters:
            for part in parts:
                if part.merged:
                    part.unmerge()
            return True
        if all(part.merged for part in parts):
            self.routing.check_merged_task(self._merged_task)
            return True
        return not any(name in part.mola_A for part in parts for name in part.active_adapters)

    def _project(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Project to queries, keys and values, those of the same input at once."""
        size = self._get_attention().embed_dim
        if query is key is value:
            return self._project_to(query, 0, 3 * size).split(size, dim=-1)
        queries = self._project_to(query, 0, size)
        if key is value:
            return queries, *self._project_to(key, size, 3 * size).split(size, dim=-1)
        return queries, self._project_to(key, size, 2 * size), self._project_to(value, 2 * size, 3 * size)

    def _project_to(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        attention, outputs = self._get_attention(), slice(start, stop)
        bias = None if attention.in_proj_bias is None else attention.in_proj_bias[outputs]
        result = F.linear(x, self._get_base_weight()[outputs], bias)
        dtype = result.dtype
        if self.merged:
            self.routing.check_merged_task(self._merged_task)
            return result
        for name in self.active_adapters:
            if name in self.mola_A:
                result = result + self._mixture(name, x, outputs)
        return result.to(dtype)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(B, heads, L, embed / heads)`."""
        attention = self._get_attention()
        x = x.unflatten(-1, (attention.num_heads, attention.head_dim))
        return x.transpose(1, 2) if attention.batch_first else x.permute(1, 2, 0, 3)

    def _get_attention(self) -> nn.MultiheadAttention:
        return cast(nn.MultiheadAttention, self.base_layer)

    def _get_out_proj(self) -> Linear:
        return cast(Linear, self._get_attention().out_proj)

    def get_base_weight(self) -> torch.Tensor:
        """Return the weight of the input projection, `(3 * embed, embed)`."""
        return self._get_base_weight().data

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Replace the weight of the input projection.

        Args:
            weight_data: New weight, `(3 * embed, embed)`.
        """
        self._get_base_weight().data = weight_data

    def _get_base_weight(self) -> torch.Tensor:
        return self._get_attention().in_proj_weight

    def _expert_shape(self) -> tuple[tuple[int, ...], int]:
        out_features, in_features = self._get_base_weight().shape
        return (in_features,), out_features


LAYERS[nn.MultiheadAttention] = MultiheadAttention


def leave_fused_paths(model: nn.Module) -> None:
    """Let `torch.nn.TransformerEncoder` and its layers call their modules in evaluation, where these are adapted.

    Otherwise they hand the weights of the modules to a fused function, which knows no adapters.

    Args:
        model: Model, wrapped or not.
    """
    for module in model.modules():
        for fused, attribute in _FUSED.items():
            if isinstance(module, fused) and any(isinstance(part, MolaLayer) for part in module.modules()):
                before = vars(module).setdefault("_mola_fused", getattr(module, attribute, False))
                setattr(module, attribute, type(before)(0))


def restore_fused_paths(model: nn.Module) -> None:
    """Undo `leave_fused_paths`.

    Args:
        model: Model, wrapped or not.
    """
    for module in model.modules():
        for fused, attribute in _FUSED.items():
            if isinstance(module, fused) and "_mola_fused" in vars(module):
                setattr(module, attribute, vars(module).pop("_mola_fused"))


def _check_attention(target: nn.Module) -> None:
    """Raise an error unless a module is an attention that `MultiheadAttention` reproduces."""
    if isinstance(target, BaseTunerLayer):
        raise TypeError(
            f"Target module {target} is not supported: another PEFT method has adapted this attention. Leave it out "
            "with `target_modules` or `exclude_modules`."
        )
    attention = cast(nn.MultiheadAttention, target)
    if type(attention).forward is not nn.MultiheadAttention.forward:
        raise TypeError(
            f"Target module {target} is not supported: {type(attention).__name__} has a forward method of its own. "
            "Adapt the layers inside of it, or leave it out with `target_modules` or `exclude_modules`."
        )
    options = {
        f"kdim={attention.kdim} or vdim={attention.vdim} other than embed_dim={attention.embed_dim}": (
            not attention._qkv_same_embed_dim
        ),
        "add_bias_kv=True": attention.bias_k is not None or attention.bias_v is not None,
        "add_zero_attn=True": attention.add_zero_attn,
    }
    for option, given in options.items():
        if given:
            raise ValueError(
                f"Target module {target} is not supported: MoLA does not adapt a torch.nn.MultiheadAttention with "
                f"{option}. Leave it out with `target_modules` or `exclude_modules`."
            )


def _join_masks(
    attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor
) -> torch.Tensor | None:
    """Return what to add to the scores `(B, heads, L, S)`, or None."""
    batch_size, num_heads, length = q.shape[:3]
    mask = None
    if attn_mask is not None:
        shapes = {2: (length, k.shape[2]), 3: (batch_size * num_heads, length, k.shape[2])}
        if attn_mask.shape != shapes.get(attn_mask.dim()):
            raise RuntimeError(
                f"attn_mask has the shape {tuple(attn_mask.shape)}; it must be {shapes[2]} or {shapes[3]}."
            )
        mask = _as_summand(attn_mask, q.dtype)
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch_size, num_heads))
    if key_padding_mask is not None:
        if key_padding_mask.shape != (batch_size, k.shape[2]):
            raise RuntimeError(
                f"key_padding_mask has the shape {tuple(key_padding_mask.shape)}; it must be "
                f"{(batch_size, k.shape[2])}."
            )
        padding = _as_summand(key_padding_mask, q.dtype)[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask


def _as_summand(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask of numbers; a bool mask is True where attention is forbidden."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"A mask of type {mask.dtype} is not supported; it must be bool or floating-point.")
    return mask.to(dtype)
