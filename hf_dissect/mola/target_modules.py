"""Default target modules of an adapter, by the model type of transformers."""

_ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
# The output projection of SigLIP's pooling head is left out: nn.MultiheadAttention reads its weight without a call.
_SIGLIP = ["q_proj", "k_proj", "v_proj", "self_attn.out_proj", "fc1", "fc2"]
_VIT = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
_BERT = ["query", "key", "value", "dense"]
TARGET_MODULES = {
    "clip": _ATTENTION_AND_MLP,
    "clip_text_model": _ATTENTION_AND_MLP,
    "clip_vision_model": _ATTENTION_AND_MLP,
    "siglip": _SIGLIP,
    "siglip_text_model": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP,
    "chinese_clip": [*_ATTENTION_AND_MLP, *_BERT],
    "align": [*_BERT, "expand_conv", "project_conv"],
    "vision-text-dual-encoder": [*_ATTENTION_AND_MLP, "o_proj", *_BERT, "convolution"],
    "vit": _VIT,
    "resnet": ["convolution"],
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "mpnet": ["q", "k", "v", "o", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": _ATTENTION_AND_MLP,
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "dinov2": _VIT,
    "swin": _VIT,
    "convnext": ["pwconv1", "pwconv2"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
}
