"""Models, processors and pairs small enough that a test may train them, built without any file or network."""

import io
import itertools
import string

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlignConfig,
    AlignModel,
    AlignProcessor,
    BertConfig,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    EfficientNetConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Siglip2Config,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from hf_dissect import MolaConfig
from hf_dissect.models.loading import find_max_text_length, find_text_padding

IMAGE_SIZE = 32
PATCH_SIZE = 16
MAX_LENGTH = 16
SIGLIP2_MAX_LENGTH = 48
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "white": (245, 245, 245),
    "purple": (150, 40, 170),
    "orange": (250, 140, 20),
    "grey": (128, 128, 128),
}
PLACES = ("left", "right", "top", "bottom")
VERBS = ("a {} patch on the {}", "the {} colour fills the {}", "there is {} at the {}", "{} paint covers the {} half")
CAPTIONS = [verb.format(colour, place) for verb, colour, place in itertools.product(VERBS, COLOURS, PLACES)]
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
FAMILIES = ["tiny_clip", "tiny_siglip", "tiny_siglip2", "tiny_dual_encoder", "tiny_chinese_clip", "tiny_align"]
TRANSFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ALIGN_VISION = {
    "image_size": IMAGE_SIZE,
    "hidden_dim": 32,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "depth_divisor": 8,
    "kernel_sizes": [3, 3],
    "in_channels": [32, 16],
    "out_channels": [16, 32],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
    "depthwise_padding": [],
}


def clip_tokenizer() -> CLIPTokenizer:
    """A real `CLIPTokenizer` whose vocabulary is the 512 bytes, the words of `CAPTIONS` and the two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    merges = []
    for word in WORDS:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            if (left, right) not in merges:
                merges.append((left, right))
                vocabulary.append(left + right)
            left += right
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_LENGTH)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer with `[CLS] ... [SEP]`, of the words of `CAPTIONS` and single letters."""
    letters = [prefix + letter for prefix in ("", "##") for letter in string.ascii_lowercase]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(word for word in WORDS if len(word) > 1)]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=MAX_LENGTH,
    )


def siglip_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer that ends a caption with `</s>` and pads with it, as SigLIP's does."""
    ids = {token: index for index, token in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="</s>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids"],
    )


def siglip2_tokenizer() -> Siglip2Tokenizer:
    """A real `Siglip2Tokenizer` of single letters: AutoTokenizer rebuilds that class whatever was saved."""
    letters = sorted(set("".join(CAPTIONS)) - {" "}) + ["▁"]
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    end = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return Siglip2Tokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=[],
        post_processor=end,
        padding_side="right",
        model_max_length=SIGLIP2_MAX_LENGTH,
        model_input_names=["input_ids"],
    )


def square_image_processor() -> CLIPImageProcessorPil:
    """Resizes to 32 x 32 without cropping."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size=square, do_center_crop=False)


def _text_config(tokenizer: PreTrainedTokenizerFast, **fields) -> dict:
    return {
        **TRANSFORMER,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **fields,
    }


def _vision_config(**fields) -> dict:
    return {**TRANSFORMER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **fields}


def tiny_clip(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A CLIP model (softmax loss, causal text tower pooled at the end token) with 32-dimensional embeddings."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    config = CLIPConfig(
        text_config=_text_config(tokenizer, projection_dim=32),
        vision_config=_vision_config(projection_dim=32),
        projection_dim=32,
    )
    return CLIPModel(config).eval(), CLIPProcessor(square_image_processor(), tokenizer)


def tiny_siglip(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A SigLIP model (sigmoid loss, text pooled at the last position) with 32-dimensional embeddings."""
    torch.manual_seed(seed)
    tokenizer = siglip_tokenizer()
    config = SiglipConfig(text_config=_text_config(tokenizer), vision_config=_vision_config())
    return SiglipModel(config).eval(), SiglipProcessor(square_image_processor(), tokenizer)


def tiny_siglip2(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A SigLIP 2 model (patches of any aspect ratio) whose images are 4 patches of 16 x 16."""
    torch.manual_seed(seed)
    tokenizer = siglip2_tokenizer()
    vision = {**TRANSFORMER, "patch_size": PATCH_SIZE, "num_patches": 4}
    text = _text_config(tokenizer, max_position_embeddings=SIGLIP2_MAX_LENGTH)
    config = Siglip2Config(text_config=text, vision_config=vision)
    image_processor = Siglip2ImageProcessorPil(patch_size=PATCH_SIZE, max_num_patches=4)
    return Siglip2Model(config).eval(), Siglip2Processor(image_processor, tokenizer)


def tiny_dual_encoder(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A VisionTextDualEncoder of ViT and BERT with 32-dimensional embeddings."""
    torch.manual_seed(seed)
    tokenizer = bert_tokenizer()
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**_vision_config()), BertConfig(**_text_config(tokenizer)), projection_dim=32
    )
    processor = VisionTextDualEncoderProcessor(square_image_processor(), tokenizer)
    return VisionTextDualEncoderModel(config).eval(), processor


def tiny_chinese_clip(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A Chinese-CLIP model (ViT and BERT) with 32-dimensional embeddings."""
    torch.manual_seed(seed)
    tokenizer = bert_tokenizer()
    config = ChineseCLIPConfig(
        text_config=_text_config(tokenizer), vision_config=_vision_config(projection_dim=32), projection_dim=32
    )
    return ChineseCLIPModel(config).eval(), ChineseCLIPProcessor(square_image_processor(), tokenizer)


def tiny_align(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """An ALIGN model (EfficientNet with batch-norm, and BERT; a `temperature` instead of `logit_scale`)."""
    torch.manual_seed(seed)
    tokenizer = bert_tokenizer()
    config = AlignConfig(text_config=_text_config(tokenizer), vision_config=ALIGN_VISION, projection_dim=32)
    return AlignModel(config).eval(), AlignProcessor(square_image_processor(), tokenizer)


def tiny_efficientnet_dual_encoder(seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A VisionTextDualEncoder of EfficientNet (batch norm with statistics of its own) and BERT."""
    torch.manual_seed(seed)
    tokenizer = bert_tokenizer()
    vision = EfficientNetConfig(**{**ALIGN_VISION, "hidden_dim": 1280}, hidden_size=1280)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, BertConfig(**_text_config(tokenizer)), projection_dim=32
    )
    model = VisionTextDualEncoderModel(config)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand(buffer.shape) + ("var" in name) * 0.5)
    return model.eval(), VisionTextDualEncoderProcessor(square_image_processor(), tokenizer)


def tiny_picture(index: int, seed: int = 0) -> tuple[PILImage.Image, str]:
    """Picture number `index` (one half coloured, the rest near black) and the words its captions are made of."""
    colour = list(COLOURS)[index % len(COLOURS)]
    place = PLACES[index // len(COLOURS) % len(PLACES)]
    pixels = np.random.default_rng([seed, index]).integers(0, 40, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    half = IMAGE_SIZE // 2
    rows = {"top": slice(0, half), "bottom": slice(half, None)}.get(place, slice(None))
    columns = {"left": slice(0, half), "right": slice(half, None)}.get(place, slice(None))
    pixels[rows, columns] = COLOURS[colour]
    return PILImage.fromarray(pixels), f"{colour} {place}"


def tiny_pairs(num_rows: int = 64, seed: int = 0, captions_per_image: int = 1, noisy: int = 0) -> Dataset:
    """Rows of `image` (undecoded PNG) and `caption`, or `captions` where there are several.

    `noisy` rows, the first ones, wear the captions of the next of them; the column `clean` is then there and tells.
    """
    pictures = [tiny_picture(index, seed) for index in range(num_rows)]
    images, captions, clean = [], [], []
    for index, (picture, _) in enumerate(pictures):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
        words = pictures[(index + 1) % noisy if index < noisy else index][1].split()
        captions.append([VERBS[(index + j) % len(VERBS)].format(*words) for j in range(captions_per_image)])
        clean.append(index >= noisy)
    several = captions_per_image > 1
    columns = {"image": images}
    features = {"image": Image(decode=False)}
    if several:
        columns["captions"], features["captions"] = captions, List(Value("string"))
    else:
        columns["caption"], features["caption"] = [names[0] for names in captions], Value("string")
    if noisy:
        columns["clean"] = [[value] * captions_per_image for value in clean] if several else clean
        features["clean"] = List(Value("bool")) if several else Value("bool")
    return Dataset.from_dict(columns, features=Features(features))


def tiny_inputs(model: PreTrainedModel, processor: ProcessorMixin, captions: list[str]) -> dict[str, torch.Tensor]:
    """What the collator makes of four pictures and of captions."""
    padding, length = find_text_padding(model), find_max_text_length(model, processor)
    texts = processor.tokenizer(captions, padding=padding, truncation=True, max_length=length, return_tensors="pt")
    pictures = [tiny_picture(index)[0] for index in range(4)]
    return {**texts, **processor.image_processor(images=pictures, return_tensors="pt")}


def with_lora(model: PreTrainedModel) -> PeftModel:
    """The model with adapters of rank 2 on the query projections of both towers."""
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "query"]))


def with_mola(model: PreTrainedModel, variant: str = "router", **settings) -> PeftModel:
    """The model with two experts of rank 2 in both towers."""
    config = {"num_experts": 2, "r": 2, "alpha": 4.0, "target_modules": ["q_proj", "query", "fc1"], **settings}
    return get_peft_model(model, MolaConfig(variant=variant, **config))


class Wrapper(torch.nn.Module):
    """Holds a model the way DDP does."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module


def tiny_configs() -> dict[str, dict]:
    """Configurations to build from scratch, by model type; the text fields leave out what a tokenizer tells."""
    vision = {**TRANSFORMER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    text = dict(TRANSFORMER)
    siglip2_vision = {**TRANSFORMER, "patch_size": PATCH_SIZE, "num_patches": 4}
    towers = {"vision_config": {"model_type": "vit", **vision}, "text_config": {"model_type": "bert", **text}}
    configs = {
        "clip": {"vision_config": vision, "text_config": text, "projection_dim": 32},
        "siglip": {"vision_config": vision, "text_config": text},
        "siglip2": {"vision_config": siglip2_vision, "text_config": text},
        "align": {"vision_config": ALIGN_VISION, "text_config": text, "projection_dim": 32},
        "chinese_clip": {"vision_config": vision, "text_config": text, "projection_dim": 32},
        "vision-text-dual-encoder": {**towers, "projection_dim": 32},
    }
    return {model_type: {"model_type": model_type, **config} for model_type, config in configs.items()}
