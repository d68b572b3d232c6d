"""T5 encoders as text encoders: Flan-T5 of the language model, T5 v1.1 of the diffusion model.

Letters: B batch, L tokens, D width.

flan-t5 (specification §4.3): left padding to the longest text, truncation, attention mask; returned are the
real tokens only, moved to the front of their row. t5-v1.1 (§5.10): padded to max_length, no mask, all rows
returned. `</s>` is appended in both. Weights and activations have the configured dtype (bf16 in the release),
without autocast; states are handed out as float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel

from landiff.configs.base import ConfigError
from landiff.model_zoo.frozen.config import FlanT5Config, T5V11Config
from landiff.model_zoo.frozen.weights import encoder_fingerprint, local_or_hub, unreadable


class T5Text(nn.Module):
    def __init__(
        self,
        network: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        config: FlanT5Config | T5V11Config,
        mark: str,
    ) -> None:
        super().__init__()
        self.name = config.kind
        self.fingerprint = mark
        self.dim: int = network.config.d_model
        self.max_length = config.max_length
        self.padded = isinstance(config, T5V11Config)
        self.network = network
        self.tokenizer = tokenizer
        self.eval().requires_grad_(False)

    def cut_off(self, texts: list[str]) -> list[str]:
        """The end of each text that `max_length` tokens leave out, "" where nothing is."""
        kept = self.max_length - self.tokenizer.num_special_tokens_to_add()
        fast = self.tokenizer.is_fast
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

    @torch.no_grad()
    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """-> float32 states [B, L, D], lengths int64 [B]; rows at and past a length are zero."""
        tokens = self.tokenizer(
            list(texts),
            max_length=self.max_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
            padding="max_length" if self.padded else "longest",
            padding_side="right" if self.padded else "left",
        ).to(self.network.device)
        if self.padded:
            states_BLD = self.network(input_ids=tokens.input_ids).last_hidden_state.float()
            return states_BLD, torch.full((len(texts),), self.max_length, device=states_BLD.device)
        mask_BL = tokens.attention_mask
        states_BLD = self.network(
            input_ids=tokens.input_ids, attention_mask=mask_BL
        ).last_hidden_state.float()
        lengths_B = mask_BL.sum(1)
        fronted_BLD = torch.zeros_like(states_BLD)
        for row, length in enumerate(lengths_B.tolist()):
            fronted_BLD[row, :length] = states_BLD[row, -length:]
        return fronted_BLD, lengths_B


def _load_tokenizer(
    place: Path | str, config: FlanT5Config | T5V11Config
) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(place, subfolder=config.tokenizer_subfolder)
    except OSError as error:
        raise unreadable(config.kind, config.path, error) from error
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{config.kind}: the tokenizer of path = {config.path!r} cannot be built ({error}); where the repository "
            "holds only spiece.model, pip install sentencepiece"
        ) from error


def build(config: FlanT5Config | T5V11Config, device: str | torch.device) -> T5Text:
    """Raises ConfigError where `config.path` can't be read."""
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
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ConfigError(
            f"{config.kind}: path = {config.path!r} lacks weights: {report['missing_keys'] or report['mismatched_keys']}"
        )
    options = {
        "max_length": config.max_length,
        "dtype": config.dtype,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
    }
    mark = encoder_fingerprint(config.kind, options, dict(network.named_parameters()))
    return T5Text(network, tokenizer, config, mark).to(device)
