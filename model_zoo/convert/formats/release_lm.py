"""Our language model and `llm/model.safetensors` of the release (docs/specification.md §6.1).

All rules are renames.
"""

from __future__ import annotations

from landiff.model_zoo.convert.rules import Rule

RULES: tuple[Rule, ...] = (
    Rule("token_embedding.weight", "visual_embedding_model.tok_emb_code.weight"),
    Rule("text.null", "cond_model.null_text_embedding"),
    Rule("text.{layer}.{kind}", "cond_model.embeddings.{layer}.{kind}"),
    Rule("micro.{scalar}.fc0.{kind}", "micro_condition.mlps.{scalar}.0.{kind}"),
    Rule("micro.{scalar}.fc1.{kind}", "micro_condition.mlps.{scalar}.2.{kind}"),
    Rule("blocks.{i}.norm0.weight", "transformer.blocks.{i}.norm0.weight"),
    Rule("blocks.{i}.norm1.weight", "transformer.blocks.{i}.norm1.weight"),
    Rule("blocks.{i}.wqkv.weight", "transformer.blocks.{i}.wqkv.weight"),
    Rule("blocks.{i}.wo.weight", "transformer.blocks.{i}.wo.weight"),
    Rule("blocks.{i}.w1.weight", "transformer.blocks.{i}.mlp.w1.weight"),
    Rule("blocks.{i}.w2.weight", "transformer.blocks.{i}.mlp.w2.weight"),
    Rule("blocks.{i}.w3.weight", "transformer.blocks.{i}.mlp.w3.weight"),
    Rule("final_norm.{kind}", "transformer.layer_norm.{kind}"),
    Rule("head.weight", "transformer.head.weight"),
)
