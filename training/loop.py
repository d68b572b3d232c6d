"""The training loop of all trainers and backends.

`engine.train_step` computes the loss: see `training/tokenizer/engine.py`, `training/lm/engine.py`
and `training/diffusion/engine.py`.
"""

from __future__ import annotations

from landiff.training.config import LoopConfig
from landiff.training.engine import BatchSource, Engine, TrainState
from landiff.training.run import Run
from landiff.training.validation import validate


def due(step: int, every: int) -> bool:
    """Whether an action that repeats every `every` steps is due after `step` steps. 0 is never."""
    return every > 0 and step % every == 0


def validation_due(step: int, config: LoopConfig) -> bool:
    """Whether to validate after `step` steps: every `val_every` steps, and after the last."""
    return due(step, config.val_every) or (config.val_every > 0 and step == config.steps)


def log_due(step: int, config: LoopConfig) -> bool:
    """Whether to log step `step`: every `log_every` steps, after a validation, and the last."""
    every = due(step, config.log_every)
    return every or validation_due(step, config) or step == config.steps


def fit(engine: Engine, loader: BatchSource, run: Run, config: LoopConfig) -> TrainState:
    """Train until `config.steps` steps are finished or a stop is requested, then save and return.

    Checkpoints restore the returned state, `engine` and `loader`. A run that has already reached
    `config.steps` returns at once.
    """
    with run.heartbeat as heartbeat, run.checkpoints:
        state = run.resume(engine, loader)
        stopping = False
        while state.step < config.steps and not stopping:
            run.profiler.begin(state.step + 1)
            with run.metrics.timing("data"):
                batch = loader.next_batch()
            engine.guard.bucket = batch.bucket
            result = engine.train_step(batch)  # forward, loss, backward, clip, guard, update
            state.step += 1
            run.world.step = state.step  # for the error file
            heartbeat.beat(state.step)
            run.settle(state, engine, result)  # records a skipped step, rolls back if need be
            run.metrics.count(batch, result)
            stopping = run.stop_requested()  # equal on all ranks
            last = stopping or state.step == config.steps
            if validation_due(state.step, config):
                with run.metrics.timing("validation"):
                    run.metrics.add_validation(validate(engine, loader, run))
            if log_due(state.step, config):
                run.log(state, result)  # the loop's only device sync
            if due(state.step, config.preview_every):
                with run.metrics.timing("preview"):
                    clips = loader.held_out.first(config.preview_clips)
                    run.metrics.add_previews(state, engine.preview(clips), loader.held_out)
            if last or due(state.step, config.save_every):
                with run.metrics.timing("checkpoint"):
                    run.checkpoints.save(state, engine, loader, last=last)
        run.end(state)
    return state
