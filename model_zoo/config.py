"""Sizes of the models, and how tokens are sampled. Torch-free: the command line and the launchers read these too.

The defaults are the released LanDiff sizes (reference specification §0, §3-§5); presets that differ are
YAML files (`configs/nano/model.yaml`).
"""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, model_validator

from configs.base import Config, refuse_values


class TokenizerConfig(Config):
    """Semantic tokenizer: query-token encoder, vector quantiser, decoder (specification §3)."""

    feature_channels: PositiveInt = 768  # C of the vision features
    grid_height: PositiveInt = 30  # rows of a feature frame
    grid_width: PositiveInt = 45
    hidden_size: PositiveInt = 768
    num_heads: PositiveInt = 12
    num_layers: PositiveInt = 12  # in the encoder, and again in the decoder
    token_size: PositiveInt = 768  # width of a latent token on both sides of the quantiser
    codebook_size: PositiveInt = 2048
    codebook_dim: PositiveInt = 16
    iframe_tokens: PositiveInt = 330
    pframe_tokens: PositiveInt = 74
    segment_frames: PositiveInt = 13  # semantic frames the tokenizer sees at once
    rope_theta: PositiveFloat = 10000.0
    normalize_features: bool = False  # (f - mean) / (std + 1e-8) per channel before encoding (§8.3)
    commitment_weight: float = 1.0
    codebook_decay: float = 0.8
    dead_code_threshold: float = 2.0
    kmeans_iterations: PositiveInt = 10

    @model_validator(mode="after")
    def _heads_divide(self, info: ValidationInfo) -> TokenizerConfig:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 16:
            refuse_values(info, [
                f"hidden_size / num_heads = {self.hidden_size} / {self.num_heads} must be a multiple of 16: "
                "the rotary embedding splits a head 1/4 : 3/8 : 3/8 over time, row and column"
            ])
        return self


class LMConfig(Config):
    """Autoregressive model over semantic tokens (specification §4)."""

    codebook_size: PositiveInt = 2048
    iframe_tokens: PositiveInt = 330
    pframe_tokens: PositiveInt = 74
    segment_frames: PositiveInt = 13
    hidden_size: PositiveInt = 2048
    num_layers: PositiveInt = 24
    num_heads: PositiveInt = 16
    ffn_size: PositiveInt = 11008
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10000.0
    max_positions: PositiveInt = 32768
    text_dim: PositiveInt = 4096  # width of the text encoder's states
    max_text_tokens: PositiveInt = 512
    micro_hidden_size: PositiveInt = 512
    micro_frequency_dim: PositiveInt = 256

    @model_validator(mode="after")
    def _heads_divide(self, info: ValidationInfo) -> LMConfig:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            refuse_values(info, [
                f"hidden_size / num_heads = {self.hidden_size} / {self.num_heads} must be a whole even number"
            ])
        return self


class TokenSamplingConfig(Config):
    """How tokens are drawn from the language model (specification §4.7)."""

    guidance: PositiveFloat = 7.5  # l_uncond + guidance * (l_cond - l_uncond); 1 switches it off and halves the work
    temperature: PositiveFloat = 1.0
    top_k: PositiveInt | None = None  # keep the k most likely ids; 1 = always the most likely
    top_p: PositiveFloat | None = None  # keep the most likely ids until their mass reaches p
    predict_end: bool = False  # the model may end a video of several segments early
    reference_behaviour: bool = False  # draw as the reference implementation does; see model_zoo/sample/tokens.py

    @model_validator(mode="after")
    def _filters(self, info: ValidationInfo) -> TokenSamplingConfig:
        problems = []
        if self.top_k is not None and self.top_p is not None:
            problems.append(
                f"top_k = {self.top_k} and top_p = {self.top_p} exclude each other; set one to null"
            )
        if self.top_p is not None and self.top_p > 1:
            problems.append(f"top_p = {self.top_p} is a share of the probability mass: at most 1")
        refuse_values(info, problems)
        return self


class TransformerConfig(Config):
    """Main diffusion transformer, CogVideoX-2B as packaged for SAT (specification §5.1)."""

    latent_channels: PositiveInt = 16
    latent_frames: PositiveInt = 13
    latent_height: PositiveInt = 60
    latent_width: PositiveInt = 90
    patch_size: PositiveInt = 2
    hidden_size: PositiveInt = 1920
    num_layers: PositiveInt = 30
    num_heads: PositiveInt = 30
    time_embed_dim: PositiveInt = 512
    text_length: PositiveInt = 226  # rows of text states, pads included and attended
    text_dim: PositiveInt = 4096
    spatial_interpolation: PositiveFloat = 1.875  # row and column indices are divided by it

    @model_validator(mode="after")
    def _divides(self, info: ValidationInfo) -> TransformerConfig:
        problems = []
        if self.hidden_size % self.num_heads:
            problems.append(
                f"hidden_size = {self.hidden_size} is not a multiple of num_heads = {self.num_heads}"
            )
        if self.hidden_size % 16:
            problems.append(
                f"hidden_size = {self.hidden_size} is not a multiple of 16: the position table splits it "
                "1/4 : 3/8 : 3/8"
            )
        if self.latent_height % self.patch_size or self.latent_width % self.patch_size:
            problems.append(
                f"latent_height x latent_width = {self.latent_height} x {self.latent_width} does not divide "
                f"into patches of {self.patch_size}"
            )
        refuse_values(info, problems)
        return self


class SemanticConditionConfig(Config):
    """Feature upsampler + zero-initialised projection to a semantic latent (specification §5.3)."""

    feature_channels: PositiveInt = 768
    base_channels: PositiveInt = 128
    channel_multipliers: tuple[PositiveInt, ...] = (1, 4)  # level 0 (full size) first
    num_res_blocks: NonNegativeInt = 4  # a level holds one more
    out_channels: PositiveInt = 64


class DiffusionConfig(Config):
    """Control diffusion model: main transformer, control branch, semantic condition (specification §5)."""

    transformer: TransformerConfig = TransformerConfig()
    control_layers: PositiveInt = 15
    semantic: SemanticConditionConfig = SemanticConditionConfig()

    @model_validator(mode="after")
    def _control_fits(self, info: ValidationInfo) -> DiffusionConfig:
        if self.control_layers > self.transformer.num_layers:
            refuse_values(info, [
                f"control_layers = {self.control_layers} exceeds transformer.num_layers = "
                f"{self.transformer.num_layers}"
            ])
        return self


class ScheduleConfig(Config):
    """Zero-terminal-SNR noise schedule with shift (specification §5.5)."""

    num_timesteps: PositiveInt = 1000
    linear_start: PositiveFloat = 0.00085
    linear_end: PositiveFloat = 0.0120
    shift_scale: PositiveFloat = 3.0


class ModelConfig(Config):
    """One preset: the models that fit each other. Sections are referred to as `nano/model#lm` in YAML."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    lm: LMConfig = LMConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    schedule: ScheduleConfig = ScheduleConfig()
