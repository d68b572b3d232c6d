"""Sizes of the models, and how tokens are sampled.

Torch-free: the command line and the launchers read this file as well. The defaults are the sizes of
the released LanDiff model (docs/specification.md §0, §3 to §5). Presets that differ are YAML files,
such as `configs/nano/model.yaml`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

from landiff.configs.base import Config, refuse_values


class TokenizerConfig(Config):
    """Semantic tokenizer: encoder with query tokens, vector quantizer, decoder (§3)."""

    feature_channels: PositiveInt = Field(
        default=768, description="Channels of the vision features."
    )
    grid_height: PositiveInt = Field(
        default=30, description="Height of the feature map of a frame, in cells."
    )
    grid_width: PositiveInt = Field(
        default=45, description="Width of the feature map of a frame, in cells."
    )
    hidden_size: PositiveInt = Field(
        default=768,
        description="Width of the transformer blocks. `hidden_size / num_heads` must be a "
        "multiple of 16.",
    )
    num_heads: PositiveInt = Field(default=12, description="Attention heads of each block.")
    num_layers: PositiveInt = Field(
        default=12, description="Blocks of the encoder; the decoder has as many."
    )
    token_size: PositiveInt = Field(
        default=768, description="Width of a latent token before and after the quantizer."
    )
    codebook_size: PositiveInt = Field(default=2048, description="Number of codes.")
    codebook_dim: PositiveInt = Field(default=16, description="Width of a code vector.")
    iframe_tokens: PositiveInt = Field(
        default=330, description="Tokens of an I frame, the first frame of a segment."
    )
    pframe_tokens: PositiveInt = Field(
        default=74, description="Tokens of a P frame, any further frame of a segment."
    )
    segment_frames: PositiveInt = Field(
        default=13, description="Semantic frames of a segment, the input of the tokenizer."
    )
    rope_theta: PositiveFloat = Field(
        default=10000.0, description="Base of the frequencies of the rotary embedding (§3.4)."
    )
    latent_positions: Literal["diagonal", "grid"] = Field(
        default="diagonal",
        description=(
            "Positions of latent tokens in the rotary embedding. `diagonal`: latent m of a segment "
            "is at (m, m, m), as in the release (§3.4). `grid`: the latents of a frame have its "
            "time and are spread evenly over its rows and columns, so that a small model learns "
            "the cells of each latent early."
        ),
    )
    local_paths: bool = Field(
        default=False,
        description=(
            "Initialize each latent with the mean of the cells that it covers, and each decoded "
            "cell with the latents that cover it, in addition to the learned query and mask token. "
            "A small model then learns before its attention has formed. Needs `latent_positions: "
            "grid`."
        ),
    )
    cell_mask_tokens: bool = Field(
        default=False,
        description="Learn a mask token for each cell of the grid instead of one for all cells.",
    )
    normalize_features: bool = Field(
        default=False,
        description=(
            "Encode (f - mean) / (std + 1e-8) instead of the features f, per channel, and invert "
            "this after decoding (§3.8). Mean and std are those of the first global batch of "
            "training."
        ),
    )
    commitment_weight: float = Field(
        default=1.0,
        description="Weight of the commitment loss, relative to the reconstruction loss.",
    )
    codebook_decay: float = Field(
        default=0.8,
        description="Decay of the codebook's moving averages, once per forward pass in training.",
    )
    dead_code_threshold: float = Field(
        default=2.0,
        description=(
            "Codes whose moving average of uses per forward pass is below this number are replaced "
            "by vectors of the batch."
        ),
    )
    dead_code_share: PositiveFloat | None = Field(
        default=None,
        description=(
            "Instead of `dead_code_threshold`: a fraction of the expected uses of a code per "
            "forward pass, which are tokens of the global micro-batch / `codebook_size`. Unlike "
            "`dead_code_threshold`, it does not depend on the batch size. null: use "
            "`dead_code_threshold`."
        ),
    )
    kmeans_iterations: PositiveInt = Field(
        default=10,
        description=(
            "Iterations of the k-means that initializes the codebook in the first forward pass of "
            "training."
        ),
    )

    @model_validator(mode="after")
    def _heads_divide(self, info: ValidationInfo) -> TokenizerConfig:
        head_dim, remainder = divmod(self.hidden_size, self.num_heads)
        if remainder or head_dim % 16:
            problem = (
                f"hidden_size / num_heads = {self.hidden_size} / {self.num_heads} must be a "
                "multiple of 16: the rotary embedding splits a head 1/4 : 3/8 : 3/8 over time, "
                "row and column"
            )
            refuse_values(info, [problem])
        return self

    def sized(self, grid_height: int, grid_width: int) -> TokenizerConfig:
        """The config of the same model for feature maps of another size."""
        return self.model_copy(update={"grid_height": grid_height, "grid_width": grid_width})

    @model_validator(mode="after")
    def _paths_have_positions(self, info: ValidationInfo) -> TokenizerConfig:
        if self.local_paths and self.latent_positions != "grid":
            problem = (
                "local_paths needs latent_positions = grid: latents on the diagonal cover no cells"
            )
            refuse_values(info, [problem])
        return self


class LMConfig(Config):
    """Autoregressive model of semantic tokens (§4)."""

    codebook_size: PositiveInt = Field(
        default=2048, description="Number of codes, as in the tokenizer."
    )
    iframe_tokens: PositiveInt = Field(
        default=330, description="Tokens of an I frame, as in the tokenizer."
    )
    pframe_tokens: PositiveInt = Field(
        default=74, description="Tokens of a P frame, as in the tokenizer."
    )
    segment_frames: PositiveInt = Field(
        default=13, description="Semantic frames of a segment, as in the tokenizer."
    )
    hidden_size: PositiveInt = Field(
        default=2048,
        description="Width of the transformer blocks. `hidden_size / num_heads` must be even.",
    )
    num_layers: PositiveInt = Field(default=24, description="Number of transformer blocks.")
    num_heads: PositiveInt = Field(default=16, description="Attention heads of each block.")
    ffn_size: PositiveInt = Field(default=11008, description="Inner width of the gated MLP.")
    norm_eps: PositiveFloat = Field(
        default=1e-5, description="Epsilon of all RMSNorms and of the final LayerNorm."
    )
    rope_theta: PositiveFloat = Field(
        default=10000.0, description="Base of the frequencies of the rotary embedding."
    )
    max_positions: PositiveInt = Field(
        default=32768,
        description="Maximum sequence length, in positions: conditions, text and tokens together.",
    )
    text_dim: PositiveInt = Field(default=4096, description="Width of the text states.")
    max_text_tokens: PositiveInt = Field(
        default=512, description="Maximum length of a text, in tokens of the text encoder."
    )
    micro_hidden_size: PositiveInt = Field(
        default=512, description="Inner width of the MLP of a micro-condition."
    )
    micro_frequency_dim: PositiveInt = Field(
        default=256, description="Width of the sinusoid of a micro-condition (§4.4)."
    )
    grid_condition: bool = Field(
        default=False,
        description=(
            "Condition the model on the rows and columns of feature cells of a clip, in addition "
            "to its number of frames, for training on several heights and widths. The released "
            "model does not have it."
        ),
    )

    @model_validator(mode="after")
    def _heads_divide(self, info: ValidationInfo) -> LMConfig:
        head_dim, remainder = divmod(self.hidden_size, self.num_heads)
        if remainder or head_dim % 2:
            problem = (
                f"hidden_size / num_heads = {self.hidden_size} / {self.num_heads} must be a whole "
                "even number"
            )
            refuse_values(info, [problem])
        return self


class TokenSamplingConfig(Config):
    """Sampling of tokens from the language model (§4.7)."""

    guidance: PositiveFloat = Field(
        default=7.5,
        description=(
            "Scale g of classifier-free guidance: logits are l_uncond + g · (l_cond - l_uncond). 1 "
            "turns guidance off and halves the computation."
        ),
    )
    temperature: PositiveFloat = Field(
        default=1.0, description="The logits are divided by this number."
    )
    top_k: PositiveInt | None = Field(
        default=None,
        description=(
            "Sample only from the k most likely tokens; 1 is greedy decoding. Excludes `top_p`."
        ),
    )
    top_p: PositiveFloat | None = Field(
        default=None,
        description=(
            "Sample only from the most likely tokens whose probabilities add up to p, at most 1. "
            "Excludes `top_k`."
        ),
    )
    temperature_end: PositiveFloat | None = Field(
        default=None,
        description="Temperature of the last token; it changes linearly from `temperature`. null: "
        "constant.",
    )
    top_p_end: PositiveFloat | None = Field(
        default=None,
        description="`top_p` of the last token; it changes linearly from `top_p`. null: constant.",
    )
    context_segments: PositiveInt | None = Field(
        default=None,
        description=(
            "Number of previous segments of a long video on which the next segment is conditioned; "
            "memory then does not grow with the length. null: all, sampled in one sequence."
        ),
    )
    predict_end: bool = Field(
        default=False,
        description="Allow the model to end a video after its first segment, before the requested "
        "number of frames.",
    )
    reference_behaviour: bool = Field(
        default=False,
        description=(
            "Sample as the reference implementation does: at every position, with special tokens "
            "allowed at positions of codes (§8.7, §8.8)."
        ),
    )

    @model_validator(mode="after")
    def _filters(self, info: ValidationInfo) -> TokenSamplingConfig:
        problems = []
        if self.top_k is not None and self.top_p is not None:
            problems.append(
                f"top_k = {self.top_k} and top_p = {self.top_p} exclude each other; set one to null"
            )
        if self.top_p_end is not None and (self.top_p is None or self.top_p_end > 1):
            problems.append(
                f"top_p_end = {self.top_p_end} is a probability, at most 1, and needs top_p"
            )
        if self.top_p is not None and self.top_p > 1:
            problems.append(f"top_p = {self.top_p} is a probability: at most 1")
        refuse_values(info, problems)
        return self


class TransformerConfig(Config):
    """Main diffusion transformer, CogVideoX-2B in the packaging of SAT (§5.1)."""

    latent_channels: PositiveInt = Field(default=16, description="Channels of the latents.")
    latent_frames: PositiveInt = Field(default=13, description="Latent frames of a clip.")
    latent_height: PositiveInt = Field(
        default=60, description="Height of the latents, in latent cells."
    )
    latent_width: PositiveInt = Field(
        default=90, description="Width of the latents, in latent cells."
    )
    patch_size: PositiveInt = Field(
        default=2,
        description="Height and width of a patch, in latent cells. It must divide latent height "
        "and width.",
    )
    hidden_size: PositiveInt = Field(
        default=1920,
        description="Width of the transformer blocks: a multiple of 16 and of `num_heads`.",
    )
    num_layers: PositiveInt = Field(default=30, description="Number of transformer blocks.")
    num_heads: PositiveInt = Field(default=30, description="Attention heads of each block.")
    time_embed_dim: PositiveInt = Field(
        default=512, description="Width of the embedding of the timestep."
    )
    text_length: PositiveInt = Field(
        default=226,
        description="Number of rows of text states. Rows of padding count and are attended to.",
    )
    text_dim: PositiveInt = Field(default=4096, description="Width of the text states.")
    spatial_interpolation: PositiveFloat = Field(
        default=1.875,
        description="Row and column indices are divided by this number in the position table.",
    )
    rotary_theta: PositiveFloat | None = Field(
        default=None,
        description=(
            "Base of the frequencies of a rotary embedding of frame, row and column in the "
            "attention of video tokens, in addition to the position table. It helps attention "
            "across patches to form early in training. null: none, as in the release."
        ),
    )
    prediction: Literal["velocity", "clean"] = Field(
        default="velocity",
        description=(
            "Output of the network: the `velocity` v = a · noise - b · x0, as in the release, or "
            "the `clean` latents x0, which a narrow model learns faster because it does not have "
            "to pass the noise through."
        ),
    )

    def sized(self, frames: int, height: int, width: int) -> TransformerConfig:
        """The config of the same model for latents of another size."""
        sizes = {"latent_frames": frames, "latent_height": height, "latent_width": width}
        return self.model_copy(update=sizes)

    @model_validator(mode="after")
    def _divides(self, info: ValidationInfo) -> TransformerConfig:
        problems = []
        if self.hidden_size % self.num_heads:
            problems.append(
                f"hidden_size = {self.hidden_size} is not a multiple of num_heads = "
                f"{self.num_heads}"
            )
        if self.hidden_size % 16:
            problems.append(
                f"hidden_size = {self.hidden_size} is not a multiple of 16: the position table "
                "splits it 1/4 : 3/8 : 3/8"
            )
        if self.latent_height % self.patch_size or self.latent_width % self.patch_size:
            problems.append(
                f"latent_height x latent_width = {self.latent_height} x {self.latent_width} does "
                f"not divide into patches of {self.patch_size}"
            )
        if self.rotary_theta is not None and self.hidden_size // self.num_heads % 16:
            problems.append(
                f"hidden_size / num_heads = {self.hidden_size} / {self.num_heads} must be a "
                "multiple of 16 with rotary_theta: the rotary embedding splits a head "
                "1/4 : 3/8 : 3/8 over frame, row and column"
            )
        refuse_values(info, problems)
        return self


class SemanticConditionConfig(Config):
    """Upsampler of features and zero-initialized projection to a semantic latent (§5.3)."""

    feature_channels: PositiveInt = Field(
        default=768, description="Channels of the vision features."
    )
    upsampler: Literal["residual", "linear"] = Field(
        default="residual",
        description=(
            "`residual`: convolutional blocks with group norm, of the sizes below, as in the "
            "release. `linear`: one linear layer from the features of a cell to its latent cells. "
            "With few channels, group norm removes most of the information in the features."
        ),
    )
    base_channels: PositiveInt = Field(
        default=128,
        description="Channels of a level with multiplier 1. All widths must be multiples of 32.",
    )
    channel_multipliers: tuple[PositiveInt, ...] = Field(
        default=(1, 4),
        description=(
            "Channels of each level as multiples of `base_channels`, level 0 (full size) first. "
            "Each level except one doubles height and width."
        ),
    )
    num_res_blocks: NonNegativeInt = Field(
        default=4, description="Each level has this many residual blocks plus one."
    )
    out_channels: PositiveInt = Field(
        default=64, description="Channels of the upsampled features before the last projection."
    )

    @property
    def scale(self) -> int:
        """Latent cells per feature cell along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)


class DiffusionConfig(Config):
    """Diffusion model: main transformer, control branch and semantic condition (§5)."""

    transformer: TransformerConfig = Field(
        default=TransformerConfig(), description="Sizes of the main transformer."
    )
    control_layers: PositiveInt = Field(
        default=15,
        description="Blocks of the control branch, at most as many as the main transformer has.",
    )
    control_input: Literal["sum", "condition"] = Field(
        default="sum",
        description=(
            "Input of the control branch: the `sum` of noisy latents and semantic latent, as in "
            "the release, or only the semantic latent (`condition`), with which a small model "
            "follows the tokens earlier in training, since noise does not hide the condition."
        ),
    )
    control_projections: Literal["series", "beside"] = Field(
        default="series",
        description=(
            "Input of a control block: the projected output of the previous block (`series`, as in "
            "the release), or its output before the projection (`beside`). Projections are "
            "initialized to zero, so with `series` later blocks learn only after the earlier "
            "projections have grown."
        ),
    )
    semantic: SemanticConditionConfig = Field(
        default=SemanticConditionConfig(), description="Sizes of the semantic condition."
    )

    @model_validator(mode="after")
    def _control_fits(self, info: ValidationInfo) -> DiffusionConfig:
        if self.control_layers > self.transformer.num_layers:
            problem = (
                f"control_layers = {self.control_layers} exceeds transformer.num_layers = "
                f"{self.transformer.num_layers}"
            )
            refuse_values(info, [problem])
        return self


class ScheduleConfig(Config):
    """Shifted noise schedule with zero terminal signal-to-noise ratio (§5.5)."""

    num_timesteps: PositiveInt = Field(default=1000, description="Number of timesteps.")
    linear_start: PositiveFloat = Field(
        default=0.00085, description="β of the first timestep. √β is linear in the timestep."
    )
    linear_end: PositiveFloat = Field(default=0.0120, description="β of the last timestep.")
    shift_scale: PositiveFloat = Field(
        default=3.0, description="Shift s: ᾱ becomes ᾱ / (s + (1 - s) · ᾱ); 1 means no shift."
    )


class ModelConfig(Config):
    """Model sizes that fit each other, as one preset.

    YAML files refer to a section as `nano/model#lm`.
    """

    tokenizer: TokenizerConfig = Field(
        default=TokenizerConfig(), description="Sizes of the semantic tokenizer."
    )
    lm: LMConfig = Field(default=LMConfig(), description="Sizes of the language model.")
    diffusion: DiffusionConfig = Field(
        default=DiffusionConfig(), description="Sizes of the diffusion model."
    )
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="Noise schedule of the diffusion model."
    )
