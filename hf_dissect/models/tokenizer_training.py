"""Training the tokenizer of a model that starts from scratch, in the form that its text tower expects."""

import json
from collections.abc import Callable, Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Siglip2Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CLIP_TEXT_TOWERS = {"clip", "clip_text_model"}
SIGLIP_TEXT_TOWERS = {"siglip", "siglip_text_model"}
SIGLIP2_TEXT_TOWERS = {"siglip2", "siglip2_text_model"}


def train_tokenizer(captions: Iterable[str], text_model_type: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a lower-casing tokenizer on captions; the same captions give the same tokenizer.

    Args:
        captions: Captions, which are read once; entries that are not text are skipped.
        text_model_type: `model_type` of the model or of its text tower. CLIP's gets a `CLIPTokenizer` (byte-level pair
            encoding), SigLIP's a byte-level pair encoding with an end token, SigLIP 2's a `Siglip2Tokenizer`, any
            other a byte-level pair encoding with BERT's `[CLS] ... [SEP]`.
        vocab_size: Largest number of tokens, special tokens included; few captions give fewer.

    Raises:
        ValueError: If there are no captions, or `vocab_size` is too small for the alphabet.
    """
    train: Callable[[Iterable[str], int], PreTrainedTokenizerBase]
    if text_model_type in CLIP_TEXT_TOWERS:
        train, least = _train_clip, 2 * len(BYTES) + 2
    elif text_model_type in SIGLIP_TEXT_TOWERS:
        train, least = _train_siglip, len(BYTES) + 2
    elif text_model_type in SIGLIP2_TEXT_TOWERS:
        train, least = _train_siglip2, 64
    else:
        train, least = _train_bert, len(BYTES) + 5
    if vocab_size < least:
        raise ValueError(
            f"vocab_size must be at least {least} for the {text_model_type} text tower (its alphabet and special "
            f"tokens), got {vocab_size}; 4096 is a good size for ten thousand captions"
        )
    texts = _Texts(captions)
    tokenizer = train(texts, vocab_size)
    if texts.count == 0:
        raise ValueError(
            "captions holds no text to train a tokenizer on; give the training captions, or set tokenizer to a Hub id "
            "or a folder (model.tokenizer in a recipe)"
        )
    return tokenizer


class _Texts:
    """An iterable over the texts among captions, which counts them because they may be readable only once.

    Args:
        captions: Captions to filter.
    """

    def __init__(self, captions: Iterable[str]) -> None:
        self.captions = captions
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for caption in self.captions:
            if isinstance(caption, str) and caption.strip():
                self.count += 1
                yield caption


def _train_clip(captions: Iterable[str], vocab_size: int) -> CLIPTokenizer:
    reference = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
    # The trainer would learn only the word ends that it sees, and number them in random order, which decides between
    # equally frequent merges. An unseen end would become <|endoftext|>, the unknown token, at which the text tower
    # reads the embedding. Every byte therefore has its end-of-word form from the start, as in CLIP's own vocabulary.
    vocabulary = BYTES + [letter + "</w>" for letter in BYTES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, special_tokens=vocabulary, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = dict.fromkeys(vocabulary + [left + right for left, right in merges])
    # The end token comes last, because the largest id of a caption marks its end.
    ids = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=ids, merges=merges)  # type: ignore[arg-type]  # pairs, as in its own default


def _train_siglip(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = _train_byte_level(captions, vocab_size, ["<pad>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    # SigLIP is trained without an attention mask.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_input_names=["input_ids"]
    )


def _train_siglip2(captions: Iterable[str], vocab_size: int) -> Siglip2Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    # For training only, so that no token spans two words.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    special_tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return Siglip2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],  # type: ignore[misc]  # pairs, as in its own default
        post_processor=processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)]),
        padding_side="right",
        model_input_names=["input_ids"],
    )


def _train_bert(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = _train_byte_level(captions, vocab_size, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
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
    )


def _train_byte_level(captions: Iterable[str], vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    # Not WordPiece, whose trainer numbers the "##" letters in random order and gives another vocabulary each time.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=BYTES, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer
