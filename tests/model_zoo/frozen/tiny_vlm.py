"""Vision-language models with random weights, in the file layout of the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
)

WORDS = ("a", "the", "red", "blue", "bird", "dog", "sea", "runs", "flies", "slowly", "in", "over")
QWEN_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} assistant :"
)
IMAGES = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
LAYERS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
TEXT = {**LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}


def write_tokenizer(folder: Path, extra: tuple[str, ...]) -> dict[str, int]:
    """A tokenizer of whole words. Returns the ids of all tokens."""
    tokens = ["<unk>", "<pad>", "</s>", *extra, *WORDS]
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=list(extra),
    )
    fast.save_pretrained(folder)
    return ids


def write_qwen(folder: Path, seed: int = 0) -> Path:
    """A Qwen2-VL of 16,000 parameters."""
    ids = write_tokenizer(folder, QWEN_TOKENS)
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    images = {
        **IMAGES,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 28 * 28,
        "max_pixels": 56 * 56,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    config = Qwen2VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(ids),
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "eos_token_id": ids["</s>"],
            "pad_token_id": ids["<pad>"],
            "bos_token_id": None,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 1,
            "patch_size": 14,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return write_model(folder, config, seed)


def write_llava(folder: Path, seed: int = 0) -> Path:
    """A LLaVA of some thousand parameters, without a chat template."""
    ids = write_tokenizer(folder, ("<image>",))
    images = {
        **IMAGES,
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 28, "width": 28},
        "size": {"shortest_edge": 28},
        "do_center_crop": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    vision = CLIPVisionConfig(**LAYERS, num_attention_heads=2, image_size=28, patch_size=14)
    text = LlamaConfig(
        **TEXT,
        vocab_size=len(ids),
        eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return write_model(folder, config, seed)


def write_model(folder: Path, config, seed: int) -> Path:
    """Random weights of a config, large enough that answers differ between clips."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AutoModelForImageTextToText.from_config(config)
        for weight in network.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.4)
        words = network.get_output_embeddings().weight
        with torch.no_grad():  # answers are words, up to their longest length
            words[: len(words) - len(WORDS)] = 0
    network.save_pretrained(folder)
    return folder
