"""The one loop, for all trainers and back ends."""

from __future__ import annotations

from landiff.training.config import LoopConfig
from landiff.training.engine import BatchSource, Engine, TrainState
from landiff.training.run import Run


def due(step: int, every: int) -> bool:
    """Is something that happens every `every` steps due after `step` steps? 0 = never."""
    return every > 0 and step % every == 0


def fit(engine: Engine, loader: BatchSource, run: Run, config: LoopConfig) -> TrainState:
    """Train until `config.steps` steps are finished, or a stop is requested: then save and return.

    Survives a restart: state, engine, loader. A run that already is at `config.steps` returns at once.
    """
    with run.heartbeat as heartbeat:
        state = run.checkpoints.load_latest(engine, loader) or TrainState()
        run.metrics.resume(state)
        stopping = False
        while state.step < config.steps and not stopping:
            batch = run.metrics.waiting(loader.next_batch)
            result = engine.train_step(batch)  # forward, backward, clip, step
            state.step += 1
            run.world.step = state.step  # for the error file
            heartbeat.beat(state.step)
            run.metrics.count(batch, result)
            stopping = run.stop_requested()  # agreed across ranks
            last = stopping or state.step == config.steps
            if state.step == config.steps or due(state.step, config.log_every):
                run.metrics.log(state, result)  # the loop's only device sync
            if due(state.step, config.preview_every):
                run.metrics.add_videos(state, engine.preview())
            if last or due(state.step, config.save_every):
                run.checkpoints.save(state, engine, loader, last=last)
        run.end(state)
    return state
