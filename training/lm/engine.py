"""Engine of the language model, on Megatron-core.

Megatron-core provides DDP, optimizer, pipeline schedules, gradient reduction and the format of
checkpoints. Its schedule runs forward and backward and calls `forward_step` for each packed row,
which computes the loss.

Shape letters (docs/glossary.md): N tokens of a packed row.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import Tensor, nn

from landiff.data_pipeline.loading.samples import Batch, HeldOutBatch, Sample
from landiff.model_zoo import registry
from landiff.model_zoo.layers import require_compiler
from landiff.model_zoo.lora.config import ADAPTER, require_same_adapter
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.checkpoint.dist_files import DistFiles
from landiff.training.checkpoint.parts import StateFile, json_file
from landiff.training.config import OptimConfig
from landiff.training.ema import Ema
from landiff.training.engine import StepResult
from landiff.training.float8 import layers as float8
from landiff.training.guard import Guard
from landiff.training.layout import model_copies
from landiff.training.lm import checkpoint, sampling, validation
from landiff.training.lm.averages import ShardedAverages, copy_to_model, master_weights, parts_of
from landiff.training.lm.batch import LazyRows, LMRow, RowCache, pack
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.device import (
    create_groups,
    destroy_groups,
    megatron_device,
    seed_tensor_parallel,
    without_replacements,
)
from landiff.training.lm.layers import RowPart
from landiff.training.lm.lora import InitialAdapter, adapter_of
from landiff.training.lm.model import (
    InitialWeights,
    MegatronLM,
    ModelChunks,
    evaluate_rows,
    train_rows,
)
from landiff.training.observe.previews import Preview, SourceFrames
from landiff.training.observe.step_times import StepClock
from landiff.training.optim import rate_of_step


class MegatronEngine:
    """This rank's part of the language model and its optimizer.

    The process group exists already. `close()` frees Megatron-core's own groups.
    """

    charts = validation.CHARTS

    def __init__(self, config: LMTrainConfig, guard: Guard | None = None) -> None:
        """Build model and optimizer. Raises ConfigError if the ranks do not fit `parallel`.

        `guard`: None if no other ranks must agree on stopping.
        """
        self.config = config
        self.guard = guard or Guard(config.loop)
        self.layout = TokenLayout.of(config.model)
        self.adapter = adapter_of(config)
        self.dp_size = model_copies(config, dist.get_world_size())
        with megatron_device() as self.device:
            if config.fp8:
                float8.require_device(self.device)
            if config.compile_blocks:
                require_compiler(self.device)
            create_groups(config)
            self.dp_rank = parallel_state.get_data_parallel_rank()
            seed_tensor_parallel(config.loop.seed)
            self.chunks = ModelChunks(config)
            self.model = self.chunks.models[0]  # all of it without a virtual pipeline
            if config.compile_blocks:
                for model in self.chunks.models:
                    model.compile_blocks()
            self.clock = StepClock(self.device, self.model)
            weights = self._first_weights()
            self.load_weights(weights)
            self.ddps = [self._build_ddp(model) for model in self.chunks.models]
            self.optimizer = self._build_optimizer(weights)
            masters = master_weights(self.optimizer)
            self.ema = Ema(config.ema, [master.weight for master in masters])
            self.averages = ShardedAverages(
                self.ema, masters, divided=config.parallel.distributed_optimizer
            )
            self.model.config.finalize_model_grads_func = finalize_model_grads
            self.model.config.grad_scale_func = self.optimizer.scale_loss
            if config.parallel.overlap:
                no_sync = [ddp.no_sync for ddp in self.ddps]
                self.model.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            self._files = DistFiles()
        self.prompts = sampling.prompt_clips(config, self.layout, self.guard.world)

    def _first_weights(self) -> Mapping[str, Tensor]:
        """Weights before the first step."""
        if not self.config.init_from:
            return InitialWeights(self.config.model, self.config.loop.seed)
        entry = registry.resolve(self.config.zoo, self.config.init_from, kind="lm")
        if self.config.lora is None:
            return entry.load()
        model = self.config.model
        adapter = InitialAdapter(model, self.config.lora, self.config.loop.seed)
        return {**entry.load(), **adapter}

    def _build_ddp(self, model: MegatronLM) -> DistributedDataParallel:
        parallel = self.config.parallel
        return DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=parallel.distributed_optimizer,
                overlap_grad_reduce=parallel.overlap,
                overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
                grad_reduce_in_fp32=True,
            ),
            model,
        )

    def _build_optimizer(self, names: Iterable[str]) -> MegatronOptimizer:
        """`names`: of all weights, in `landiff.model_zoo.lm.LanguageModel`."""
        optim = self.config.optim
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.betas[0],
                adam_beta2=optim.betas[1],
                adam_eps=optim.eps,
                # With 0, Megatron-core would not compute the norm.
                clip_grad=optim.clip_grad or math.inf,
                use_distributed_optimizer=self.config.parallel.distributed_optimizer,
                bf16=self.config.precision == "bf16",
                params_dtype=self.model.config.params_dtype,
            ),
            self.ddps,
            # Megatron-core leaves the division into groups to its caller.
            _group_overrides(self.chunks, names, optim),
            use_gloo_process_groups=False,
        )
        checkpoint.prepare_optimizer(optimizer, fused=bool(optim.fused))
        return optimizer

    def train_step(self, batch: Batch) -> StepResult:
        """One optimizer step. The result is equal on all ranks."""
        self.clock.start()
        rate = rate_of_step(self.config, batch.step)
        config = self.config.at(batch.step)  # text dropout and more depend on the phase

        def make_row(number: int) -> LMRow:
            return pack(batch.micro_batches[number], config, self.layout).to(self.device)

        rows = LazyRows(len(batch.micro_batches), make_row)
        with megatron_device():
            self._set_rate(rate, config.optim.weight_decay)
            for ddp in self.ddps:
                ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            totals = self._totals(rows)  # `forward_step` has the loss
            loss_sum, num_targets, num_tokens, flops = totals.cpu().unbind()
            loss = loss_sum / num_targets
            grad_norm, updated = self._update(loss, config.optim.clip_grad)
            if updated:
                self.ema.update(batch.step + 1)
        row_tokens = sum(row.num_tokens for row in rows)
        row_length = sum(len(row.ids_N) for row in rows)
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            lr=rate,
            tokens=int(num_tokens),
            flops=float(flops),
            times=self.clock.stop(),
            skipped=not updated,
            metrics={"data/padding": 1 - row_tokens / row_length},
        )

    def _set_rate(self, rate: float, weight_decay: float) -> None:
        """Set learning rate and weight decay of all parameter groups."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_mult"]
            group["weight_decay"] = weight_decay * group["wd_mult"]

    @torch.no_grad()
    def _update(self, loss: Tensor, clip_grad: float) -> tuple[float, bool]:
        """Megatron-core's `optimizer.step()`, with the guard before the update.

        clip_grad: largest norm of the gradients, 0 for no limit.
        Returns the gradient norm before clipping, and whether the guard allowed the update.
        """
        found_inf = self.optimizer.prepare_grads()
        grad_norm = math.inf if found_inf else self.optimizer.get_grad_norm()
        updating = self.guard.decide(loss, grad_norm)
        self.clock.update()
        if not updating:
            return grad_norm, False
        # As Megatron-core's clip_grad_by_total_norm_fp32, in one pass over the buffers that all
        # gradients are views of.
        factor = (clip_grad or math.inf) / (grad_norm + 1e-6)
        if factor < 1:
            for ddp in self.ddps:
                ddp.scale_gradients(factor)
        self.optimizer.step_with_ready_grads()
        return grad_norm, True

    def _totals(self, rows: Sequence[LMRow]) -> Tensor:
        """Train on `rows`, up to the gradients.

        Returns float64 [sum of losses, targets, tokens, FLOPs] of the global batch on all ranks.
        """
        reports = train_rows(forward_step, rows, self.ddps)
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        if parallel_state.is_pipeline_last_stage():
            totals[:2] = torch.stack(reports).double().sum(0)
            if parallel_state.get_context_parallel_rank() == 0:  # all of them have these rows
                totals[2] = sum(row.num_tokens for row in rows)
                totals[3] = sum(row.flops for row in rows)
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            dist.all_reduce(totals, group=group)
        if self.config.parallel.pipeline > 1:
            dist.broadcast(
                totals,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return totals

    @torch.no_grad()
    def validate(self, batch: HeldOutBatch) -> dict[str, Tensor]:
        """Sums of losses and correct predictions (training/lm/validation.py).

        Each batch is one row with the clips' own captions and one with those of their partners.
        """
        frames = validation.max_frames(self.layout, self.config.model.max_positions)
        own = validation.own_row(batch, self.config, self.layout)
        other = validation.other_row(batch, self.config, self.layout)
        with megatron_device():
            rows = [part.to(self.device) for part in (own, other)]
            step = partial(validation.forward_step, frames=frames)
            reports = evaluate_rows(step, rows, self.ddps)
        reporting = parallel_state.is_pipeline_last_stage()
        copies = parallel_state.get_tensor_and_context_parallel_rank()
        if not reporting or copies > 0:  # the first rank of those with the same rows reports
            reports = []
        sums = validation.named_sums(reports, frames, self.device)
        if self.config.validation_samples:
            sums |= self._sampled_sums(batch, reporting=bool(reports))
        return sums

    def _sampled_sums(self, batch: HeldOutBatch, *, reporting: bool) -> dict[str, Tensor]:
        """Sums over tokens that are sampled for the first `validation_samples` clips."""
        limit = self.config.validation_samples
        if batch.first < limit:  # equal on all ranks
            part = sampling.sampling_row(batch, self.config, self.layout, self.device)
            sampling.draw_codes(part, self._logits, self.layout.codebook_size)
            if reporting:
                counted = []
                for sample, counts in zip(batch.samples, batch.counted, strict=True):
                    counted.append(counts and sample.position < limit)
                return sampling.token_sums(part, counted, self.layout)
        return sampling.zero_sums(self.layout, self.device)

    def _logits(self, row: LMRow, cache: RowCache, last: Sequence[int]) -> Tensor:
        """Append positions to a cache. Returns the logits after the places `last` of them.

        float32 [B, vocabulary], on all ranks of this copy.
        """
        self._beat()
        with megatron_device():
            step = partial(sampling.forward_step, cache=cache, last=last)
            reports = evaluate_rows(step, [row], self.ddps)
        if self.config.parallel.pipeline == 1:
            return reports[0]
        shape = (len(last), self.layout.vocab_size)
        logits_BV = torch.empty(shape, device=self.device)
        if parallel_state.is_pipeline_last_stage():
            logits_BV.copy_(reports[0])
        dist.broadcast(
            logits_BV,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        return logits_BV

    def _beat(self) -> None:
        """Record progress within a step. A clip has many codes, each with a forward pass."""
        if self.guard.world is not None:
            self.guard.world.beat()

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics by name, from the sums of `validate`."""
        metrics = validation.summarize_sums(sums, self.layout)
        if self.config.validation_samples:
            metrics |= sampling.summarize_tokens(sums)
        return metrics

    def load_weights(self, source: Mapping[str, Tensor]) -> None:
        """Load complete weights with the names of `landiff.model_zoo.lm.LanguageModel`.

        The optimizer's moments stay unchanged. The moving average starts from these weights.
        """
        with megatron_device():
            self.chunks.load_full(source)
            if hasattr(self, "optimizer"):
                self.optimizer.reload_model_params()
                self.ema.restart()

    def state_files(self) -> list[StateFile]:
        """This rank's files with model, optimizer and averages. Collective."""
        with megatron_device():
            self._gather_weights()
            files = checkpoint.state_files(
                self._files, self.chunks, self.optimizer, self.averages, self.device
            )
        if self.adapter is not None and dist.get_rank() == 0:
            files.append(json_file(ADAPTER, self.adapter))
        return files

    def load(self, folder: Path) -> None:
        """Restore a checkpoint. Collective.

        The weights come from the optimizer's float32 copies if it keeps them; of the distributed
        optimizer each rank reads its part, and they are gathered. In checkpoints that were written
        with `overlap` before `_gather_weights` existed, some weights are one step old, and their
        float32 copies are right.
        """
        require_same_adapter(folder, self.adapter)
        with megatron_device():
            self._gather_weights()  # waits for a gather that `overlap` has started
            found = checkpoint.load_checkpoint(folder, self.chunks, self.optimizer, self.averages)
            self.ema.loaded(folder, found=found)
            self._gather_weights()

    def _gather_weights(self) -> None:
        """Complete the weights after an optimizer step. Collective over data-parallel ranks.

        Each rank of the distributed optimizer updates its part of the weights. With `overlap`
        Megatron-core gathers the other parts at the start of the next forward, not in `step`.
        """
        if self.config.parallel.distributed_optimizer:
            for ddp in self.ddps:
                ddp.start_param_sync(force_sync=True)

    @contextmanager
    def weights(self, ema: bool) -> Iterator[None]:
        """Context in which forward passes read the moving averages, or the weights. Collective."""
        with megatron_device():
            self._gather_weights()  # also waits for a gather that `overlap` has started
            with self.ema.applied(ema, self._publish_weights):
                yield

    def _publish_weights(self) -> None:
        """Cast the float32 weights to those of the model, and gather them."""
        copy_to_model(self.optimizer)
        self._gather_weights()

    def local_weights(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of parameters, buffers, float32 master weights and moving averages."""
        for model in self.chunks.models:
            yield from model.named_parameters()
            yield from model.named_buffers()
        for number, part in enumerate(parts_of(self.optimizer)):
            for group in part.optimizer.param_groups:
                for index, master in enumerate(group["params"]):  # they have no names
                    yield f"float32 weight {index} of optimizer {number}", master
        yield from self.ema.named()

    @torch.no_grad()
    def preview(self, clips: Sequence[Sample]) -> list[Preview]:
        """Tokens of held-out clips, and tokens sampled with their captions, as videos. Collective.

        After them tokens sampled for `preview_prompts`. Nothing without `renderer`: tokens have no
        picture without the other models.
        """
        shown = [*clips, *self.prompts]
        if self.config.renderer is None or not shown:
            return []
        count = len(clips)
        batch = HeldOutBatch(tuple(shown), (None,) * len(shown), (True,) * len(shown))
        part = sampling.sampling_row(batch, self.config, self.layout, self.device)
        with self.weights(self.ema.enabled):
            sampling.draw_codes(part, self._logits, self.layout.codebook_size)
        codes = [*part.data[:count], *part.sampled()]
        seeds = [*part.seeds[:count], *part.seeds]
        videos = sampling.render_shared(codes, seeds, self.config, self.device, self._beat)
        previews = []
        for number, clip in enumerate(clips):
            panels = {"tokens of the clip": videos[number], "sampled": videos[count + number]}
            tag = f"preview/held_out_{number}"
            source = SourceFrames(clip.position)
            previews.append(Preview(tag, panels, clip.meta.caption, source))
        for number, prompt in enumerate(self.prompts):
            panels = {"sampled": videos[2 * count + number]}
            previews.append(Preview(f"preview/prompt_{number}", panels, prompt.meta.caption))
        return previews

    def close(self) -> None:
        """Free Megatron-core's process groups, so that this process can build another engine.

        The engine cannot be used any more. Collective.
        """
        destroy_groups()
        # Threads of a group poll until nothing refers to it, and the model is full of cycles.
        vars(self).clear()
        gc.collect()


def _group_overrides(
    model: ModelChunks, names: Iterable[str], optim: OptimConfig
) -> dict[ParamKey, dict[str, float]]:
    """The groups of `landiff.training.optim.parameter_groups`, in Megatron-core's form."""
    members: dict[tuple[float, float], set[int]] = {}
    own_names = model.own_names(names)
    for local_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        found = {optim.scales_of(name, parameter.ndim) for name in own_names[local_name]}
        assert len(found) == 1, (own_names[local_name], found)  # checked before ranks start
        members.setdefault(found.pop(), set()).add(id(parameter))
    overrides = {}
    for (lr_scale, decay_scale), ids in members.items():
        scales = {"lr_mult": lr_scale, "wd_mult": decay_scale}
        changes = {key: scale for key, scale in scales.items() if scale != 1}
        if changes:
            predicate = ParamPredicate(str(scales), partial(_is_among, ids))
            overrides[ParamKey(predicate=predicate)] = changes
    return overrides


def _is_among(ids: Set[int], parameter: nn.Parameter) -> bool:
    return id(parameter) in ids


def forward_step(rows: Iterator[LMRow], model: nn.Module) -> tuple[Tensor, Callable]:
    """Forward of the next row, and the function that computes its loss from the output.

    Megatron-core's schedule calls it for each micro-batch, and the loss function on the last
    pipeline stage.
    """
    row = next(rows)
    group = parallel_state.get_context_parallel_group()
    part = RowPart.of(row.bounds, group, row.ids_N.device)
    weights_N = row.weights_N if part is None else part.own(row.weights_N)

    def loss(token_loss_1N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the cross-entropies (`MegatronLM`), number of targets, and both for the report."""
        total = (token_loss_1N[0].float() * weights_N).sum()
        targets = weights_N.sum()
        return total, targets.to(torch.int), torch.stack([total.detach(), targets])

    with without_replacements():
        token_loss_1N = model(row, part)
    return token_loss_1N, loss
