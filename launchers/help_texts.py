"""Longer texts of `landiff --help` and `landiff COMMAND --help`. Line width: 100 columns."""

from __future__ import annotations

PIPELINE = """\
The pipeline, in order. Every command can be interrupted and run again to resume:

  landiff shards     --config nano/shards                     clips and captions -> raw shards
  landiff precompute --config nano/features                   vision features
  landiff train tokenizer --config nano/tokenizer             semantic tokenizer (torch DDP)
  landiff convert    runs/tokenizer --name tokenizer          checkpoint -> zoo
  landiff precompute --config nano/precompute                 tokens, latents, text states
  landiff train lm   --config nano/lm                         language model (Megatron-core)
  landiff convert    runs/lm --name lm                        checkpoint -> zoo
  landiff train diffusion --config nano/diffusion-main        main transformer (DeepSpeed)
  landiff convert    runs/diffusion-main --name main          checkpoint -> zoo
  landiff train diffusion --config nano/diffusion-control     control branch, main frozen
  landiff convert    runs/diffusion-control --name diffusion  checkpoint -> zoo
  landiff evaluate   --config nano/evaluate                   how much models use text and tokens
  landiff sample     --config nano/sample "a rabbit runs"     prompts -> mp4

  landiff demo       --config nano/sample                     the same in a web browser

  landiff quickstart --out runs/quickstart                    all of it, on two CPU cores
"""

PRESET = "packaged preset (nano, shapes, quickstart, landiff), or a folder made by `landiff new`"

OVERRIDES = """\
You can set any config key after the options, for example:  {example}
An unknown key is an error that names the nearest known key.
"""

PROMPTS = """
Put prompts that look like an option or a config key after --, where nothing is parsed:

  landiff sample --config nano/sample seed=7 -- "seed=7 is written on a wall" "--- a dashed line"
"""

VBENCH = """
VBench:

  landiff evaluate vbench --config landiff/sample --vbench-python vbench-env/bin/python out=vbench
"""

DEMO = """
Requires pip install 'landiff-pretrain[demo]'. To open the page from another machine, through SSH:

  ssh -L 7860:localhost:7860 HOST       then open http://localhost:7860
"""

TRAINERS = {
    "tokenizer": "Semantic tokenizer (torch DDP).",
    "lm": "Language model over semantic tokens (Megatron-core: tensor, pipeline, sequence and data "
    "parallel).",
    "diffusion": "Diffusion model (DeepSpeed ZeRO): the main transformer, then its control branch.",
}

TAKE_OVER = (
    "take over the run folder immediately, if its owner on another machine no longer runs, instead "
    "of waiting until its lock expires"
)

CONVERT = """\
  landiff convert runs/lm --name lm                           newest checkpoint of a run -> zoo
  landiff convert inspect weights/LanDiff                     describe a file or folder of weights
  landiff convert weights/LanDiff                             the LanDiff release -> zoo entries lm,
                                                              tokenizer, transformer, diffusion
  landiff convert lm --to megatron --out start/lm             zoo entry -> Megatron checkpoint for
                                                              any parallel layout
  landiff convert main --to diffusers --out CogVideoX-ours    main transformer -> a diffusers
                                                              CogVideoXTransformer3DModel
  landiff convert nano/sample --to diffusers --out LanDiff    config of `landiff sample` -> folder
                                                              of a LanDiffPipeline
  landiff convert diffusion tokenizer lm --to release --out out    zoo -> files of the release

To reshard a checkpoint with its optimizer, give the new values as overrides of the run's config.
`landiff train --config OUT/config.yaml` then resumes from the result:

  landiff convert runs/lm --to megatron --out runs/lm-2 \\
      parallel.distributed_optimizer=true parallel.tensor=2 vocab_multiple=256
  landiff convert runs/diffusion-main --to deepspeed --out runs/main-2 --world-size 16 zero.stage=3

The trainers of this project resume with other tensor, pipeline and data parallel sizes, ZeRO stages
and world sizes without conversion; only DeepSpeed itself needs it. Without a checkpoint's
optimizer, vocab_multiple, head_multiple and zero.stage are accepted as overrides too.
"""

ZOO = """\
  landiff zoo list                                            entries of the folder zoo
  landiff zoo list --zoo packaged                             the weights that come with landiff
  landiff zoo pack runs/learn --out small-zoo                 the three models of a run in bfloat16,
                                                              with success rates and provenance
"""

COMPLETION = """\
Install the script for your shell:

  bash   landiff completion bash > ~/.local/share/bash-completion/completions/landiff
  zsh    landiff completion zsh  > a file named _landiff in a folder of your $fpath
  fish   landiff completion fish > ~/.config/fish/completions/landiff.fish

New shells complete commands, options, choices, packaged config names and paths.
"""

CONFIG = """\
  landiff config                                            names of the packaged configs
  landiff config nano/lm                                    contents of a config file
  landiff config explain loop.keep_every                    type, default and meaning of a key
  landiff config explain loop.keep_every --config nano/lm   the same, for the class of one config
"""

CAPTIONS = """\
Generate a long and a short caption with a transformers model, from a folder or by its hub id:

  landiff captions --config landiff/captions columns.captions-qwen.encoder.path=models/Qwen2.5-VL
  landiff captions stats --config landiff/captions
  landiff submit precompute --config landiff/captions --cluster my-site.yaml      as an array

To use existing captions in a JSONL or parquet file with the keys of the clips, write a config with

  columns: {captions-mine: {encoder: {kind: file, path: captions.jsonl}}}

Text columns encode the captions:  text-minilm: {encoder: {kind: minilm}, captions: captions-mine}
"""

DATA = """\
  landiff data report data                     one data folder, as data/report.html
  landiff data report --config nano/lm         the data sets of a trainer, with their weights
  landiff data report data --clips 200 --out page.html
"""

COMPARE = """\
  landiff compare runs/lm runs/lm-2                           losses and differing config keys
  landiff compare runs/lm runs/lm-2 --metric 'val/*'          all validation metrics
  landiff compare runs/lm runs/lm-2 --plot loss.png --json    curves as PNG and as JSON
"""

SUBMIT = """\
All other arguments are passed to the command of the stage:

  landiff submit lm --config landiff/lm --cluster my-site.yaml --nodes 4 optim.lr=2e-4
  landiff submit precompute --config landiff/precompute --cluster my-site.yaml
  landiff submit convert runs/lm --name lm --cluster my-site.yaml
  landiff submit pipeline --preset nano --cluster my-site.yaml lm.loop.steps=100

Submitting again skips finished jobs and resumes unfinished ones. See docs/cluster.md.
"""
