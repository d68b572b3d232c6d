"""T5 encoders as text encoders: Flan-T5 of the language model, T5 v1.1 of the diffusion model.

Flan-T5 (docs/specification.md §4.3) pads on the left to the longest text, with an attention mask,
and returns only the states of real tokens, moved to the start of their row. T5 v1.1 (§5.10) pads to
max_length without a mask and returns all rows. Both append `</s>` and cut longer texts. Weights and
activations have the configured dtype (bfloat16 in the release) without autocast; the returned
states are float32.

Shape letters (docs/glossary.md): B batch, L text rows, D width of text states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from landiff.configs.base import ConfigError
from landiff.model_zoo.frozen.config import FlanT5Config, T5V11Config
from landiff.model_zoo.frozen.weights import encoder_fingerprint, local_or_hub, unreadable
from landiff.model_zoo.layers import compile_blocks


class T5Text(nn.Module):
    """`TextEncoder` around a T5 encoder. It is padded if the config is that of T5 v1.1."""

    def __init__(
        self,
        network: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        config: FlanT5Config | T5V11Config,
        fingerprint: str,
    ) -> None:
        super().__init__()
        self.name: str = config.kind
        self.fingerprint = fingerprint
        self.dim: int = network.config.d_model
        self.max_length: int = config.max_length
        self.padded = isinstance(config, T5V11Config)
        self.network = network
        self.tokenizer = tokenizer
        self.eval().requires_grad_(False)

    def compile_blocks(self, **options: Any) -> None:
        """Compiles each block at its first call. options: those of torch.compile."""
        compile_blocks(self.network.encoder.block, **options)

    def cut_off(self, texts: list[str]) -> list[str]:
        """The end of each text after its first `max_length` tokens, "" for shorter texts."""
        kept = self.max_length - self.tokenizer.num_special_tokens_to_add()
        fast = self.tokenizer.is_fast  # only fast tokenizers know the position of tokens in a text
        ends = []
        for text in texts:
            tokens = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False
            )
            if len(tokens.input_ids) <= kept:
                ends.append("")
            elif fast:
                ends.append(text[tokens.offset_mapping[kept][0] :].strip())
            else:
                ends.append(self.tokenizer.decode(tokens.input_ids[kept:]).strip())
        return ends

    def num_tokens(self, texts: list[str]) -> list[int]:
        """The tokens of each text, at most `max_length`, `</s>` included."""
        tokens = self.tokenizer(list(texts), max_length=self.max_length, truncation=True)
        return [len(ids) for ids in tokens.input_ids]

    @torch.no_grad()
    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Returns states, float32 [B, L, D], and lengths, int64 [B]. Other rows are zero."""
        padding = "longest"
        side = "left"
        if self.padded:
            padding = "max_length"
            side = "right"
        tokens = self.tokenizer(
            list(texts),
            max_length=self.max_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
            padding=padding,
            padding_side=side,
        ).to(self.network.device)
        if self.padded:
            states_BLD = self.network(input_ids=tokens.input_ids).last_hidden_state.float()
            return states_BLD, torch.full((len(texts),), self.max_length, device=states_BLD.device)
        mask_BL = tokens.attention_mask
        output = self.network(input_ids=tokens.input_ids, attention_mask=mask_BL)
        states_BLD = output.last_hidden_state.float()
        lengths_B = mask_BL.sum(1)
        moved_BLD = torch.zeros_like(states_BLD)
        for row, length in enumerate(lengths_B.tolist()):
            moved_BLD[row, :length] = states_BLD[row, -length:]
        return moved_BLD, lengths_B


def _load_tokenizer(
    place: Path | str, config: FlanT5Config | T5V11Config
) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(place, subfolder=config.tokenizer_subfolder)
    except OSError as error:
        raise unreadable(config.kind, config.path, error) from error
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{config.kind}: the tokenizer of path = {config.path!r} cannot be built ({error}); if "
            "the repository holds only spiece.model, pip install sentencepiece"
        ) from error


def build(config: FlanT5Config | T5V11Config, device: str | torch.device) -> T5Text:
    """Loads the encoder. Raises ConfigError if `config.path` cannot be read or is incomplete."""
    place = local_or_hub(config.kind, config.path)
    tokenizer = _load_tokenizer(place, config)
    try:
        network, report = T5EncoderModel.from_pretrained(
            place,
            subfolder=config.subfolder,
            dtype=getattr(torch, config.dtype),
            output_loading_info=True,
        )
    except OSError as error:
        raise unreadable(config.kind, config.path, error) from error
    missing = report["missing_keys"] or report["mismatched_keys"]
    if missing:
        raise ConfigError(f"{config.kind}: path = {config.path!r} lacks weights: {missing}")
    options = {
        "max_length": config.max_length,
        "dtype": config.dtype,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
    }
    fingerprint = encoder_fingerprint(config.kind, options, dict(network.named_parameters()))
    return T5Text(network, tokenizer, config, fingerprint).to(device)
