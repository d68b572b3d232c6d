"""Captions by a vision-language model of transformers, from frames as images.

The frames of a clip go through the model's image processor one by one. Its video processor, which
needs torchvision, is not used. Answers are the most likely tokens (greedy), so that a repeated run
writes the same captions. Clips are answered together only if their requests have equal shapes;
then no request is padded.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin

from landiff.configs.base import ConfigError
from landiff.model_zoo.frozen.config import PromptConfig, VlmConfig
from landiff.model_zoo.frozen.weights import encoder_fingerprint, local_or_hub, unreadable

UNSTABLE = ("image_processor_type", "processor_class", "_processor_class")
"""Keys of an image processor that name classes and do not change its output."""


class VlmCaptioner(nn.Module):
    """Writes captions of clips."""

    def __init__(
        self, network: Any, processor: ProcessorMixin, config: VlmConfig, fingerprint: str
    ) -> None:
        """`network`: a model of transformers that generates tokens from images and text."""
        super().__init__()
        self.name = Path(config.path).name
        self.fingerprint = fingerprint
        self.config = config
        self.network: Any = network
        self.processor = processor
        self._lock = threading.Lock()  # networks keep a state while they write an answer
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(
        self, videos: Sequence[np.ndarray], fields: Sequence[dict[str, Any]]
    ) -> list[list[str]]:
        """One list of captions for each video, in the order of the prompts.

        videos: uint8 [T, H, W, 3]. fields: values for the fields of the prompts.
        """
        captions: list[list[str]] = [[] for _ in videos]
        for prompt in self.config.prompts:
            groups: dict[str, list[tuple[int, dict[str, Tensor]]]] = {}
            for number, video_THWC in enumerate(videos):
                request = self.request(video_THWC, prompt, fields[number])
                shapes = str({name: list(value.shape) for name, value in request.items()})
                groups.setdefault(shapes, []).append((number, request))
            for members in groups.values():
                answers = self._answer([request for _, request in members], prompt.max_tokens)
                for (number, _), answer in zip(members, answers, strict=True):
                    captions[number].append(answer)
        return captions

    def request(
        self, video_THWC: np.ndarray, prompt: PromptConfig, fields: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Inputs of the network for one clip, each with a first dimension that can be joined."""
        indices = np.linspace(0, len(video_THWC) - 1, min(self.config.frames, len(video_THWC)))
        images = list(video_THWC[indices.round().astype(int)])
        words = prompt.text.format(frames=len(images), **fields)
        text = self.text(words, len(images))
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            images=images,
            text=[text],
            return_tensors="pt",
            add_special_tokens=not (bos and text.startswith(bos)),
        )
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}

    def text(self, words: str, images: int) -> str:
        """The request as text, with a placeholder for each image."""
        if self.config.template is not None:
            places = self.processor.image_token * images
            return self.config.template.replace("{images}", places).replace("{prompt}", words)
        content = [{"type": "image"} for _ in range(images)]
        content.append({"type": "text", "text": words})
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def _answer(self, requests: Sequence[dict[str, Tensor]], max_tokens: int) -> list[str]:
        """Answers to requests of equal shapes."""
        device = next(self.network.parameters()).device
        dtype = next(self.network.parameters()).dtype
        inputs = {}
        for name in requests[0]:
            joined = torch.cat([request[name] for request in requests]).to(device)
            inputs[name] = joined.to(dtype) if joined.is_floating_point() else joined
        with self._lock:
            tokens_BN = self.network.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=max_tokens
            )
        length = inputs["input_ids"].shape[1]
        answers = self.processor.tokenizer.batch_decode(
            tokens_BN[:, length:], skip_special_tokens=True
        )
        return [" ".join(answer.split()) for answer in answers]


def load_processor(place: Path | str, config: VlmConfig) -> ProcessorMixin:
    """The processor of a model without its video processor.

    Raises ConfigError if it cannot be built.
    """
    model_type = AutoConfig.from_pretrained(place).model_type
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise ConfigError(
            f"vlm: path = {config.path!r} is a model of type {model_type!r}, which takes no images "
            "with text; name a vision-language model, e.g. Qwen/Qwen2.5-VL-7B-Instruct"
        )
    import transformers

    cls = getattr(transformers, name)
    parts = {
        "image_processor": lambda: AutoImageProcessor.from_pretrained(place, backend="pil"),
        "tokenizer": lambda: AutoTokenizer.from_pretrained(place),
    }
    arguments = []
    for attribute in cls.get_attributes():
        arguments.append(parts[attribute]() if attribute in parts else None)
    values, _ = cls.get_processor_dict(place)

    def check(self: Any, attribute: str, argument: Any) -> Any:
        if argument is not None:
            return cls.check_argument_for_proper_class(self, attribute, argument)
        return None

    partial: Any = type(name, (cls,), {"check_argument_for_proper_class": check})
    return partial.from_args_and_dict(arguments, values)


def build(config: VlmConfig, device: str | torch.device) -> VlmCaptioner:
    """Loads the model. Raises ConfigError if it cannot be read, is incomplete or lacks a template.

    With a hub id it is downloaded, or taken from the hub's cache.
    """
    place = local_or_hub(config.kind, config.path)
    try:
        processor = load_processor(place, config)
        network, report = AutoModelForImageTextToText.from_pretrained(
            place, dtype=getattr(torch, config.dtype), output_loading_info=True
        )
    except OSError as error:
        raise unreadable(config.kind, config.path, error) from error
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(
            f"vlm: path = {config.path!r} is not a vision-language model that can be used here "
            f"({error})"
        ) from error
    missing = report["missing_keys"] or report["mismatched_keys"]
    if missing:
        raise ConfigError(f"vlm: path = {config.path!r} lacks weights: {sorted(missing)[:8]}")
    if config.template is None and not processor.chat_template:
        raise ConfigError(
            f"vlm: path = {config.path!r} has no chat template; set template, e.g. "
            "'USER: {images} {prompt} ASSISTANT:'"
        )
    images = json.loads(processor.image_processor.to_json_string())
    options = {
        "frames": config.frames,
        "prompts": [prompt.model_dump() for prompt in config.prompts],
        "template": config.template or processor.chat_template,
        "dtype": config.dtype,
        "vocabulary": sorted(processor.tokenizer.get_vocab().items()),
        "images": {name: value for name, value in images.items() if name not in UNSTABLE},
    }
    fingerprint = encoder_fingerprint(config.kind, options, dict(network.named_parameters()))
    return VlmCaptioner(network, processor, config, fingerprint).to(device)
