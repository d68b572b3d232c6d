"""Functions behind the actions of `landiff precompute`.

    run(config, task=(0, 1))      compute the missing columns of this task's shards
    status(config)                progress, failures and rate of each column
    retry(config, tasks)          tasks of a job array with unfinished shards
    finalize(config)              add finished columns to the manifest
    estimate(config, clips)       disk space and time of the remaining work, from a few clips
    verify(config, sample)        check a sample of the columns by recomputing it

A unit is one column of one shard (units.py). It depends only on its raw shard and the config, so
tasks can share a folder, be killed and be restarted.
"""

from __future__ import annotations

from landiff.data_pipeline.format.progress import ProgressCallback
from landiff.data_pipeline.format.schema import Manifest
from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.precompute.check import (
    ColumnCheck,
    Estimate,
    estimate_cost,
    verify_columns,
)
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.data_pipeline.precompute.job import PrecomputeTask, Summary
from landiff.data_pipeline.precompute.producers import build_producers, tokenizer_references
from landiff.data_pipeline.precompute.status import ColumnStatus, column_status, retry_arrays
from landiff.data_pipeline.precompute.units import finalize_columns


def run(
    config: PrecomputeConfig,
    task: tuple[int, int] = (0, 1),
    progress: ProgressCallback | None = None,
) -> Summary:
    """Compute the columns of one task's shards. Finished units are kept.

    `task` is (number, number of tasks). Raises ConfigError if a folder holds a column of another
    encoder, and TooManyColumnRejects if more than `max_bad_fraction` of the clips are rejected.
    """
    manifest = read_manifest(config.data)
    return PrecomputeTask(config, manifest, task, build_producers, progress).run()


def status(config: PrecomputeConfig) -> list[ColumnStatus]:
    """Return the progress of each column of the config. Builds no encoder."""
    return column_status(config, read_manifest(config.data), tokenizer_references(config))


def retry(config: PrecomputeConfig, tasks: int) -> dict[str, str]:
    """Return for each column the SLURM array expression of the tasks that have shards left.

    `tasks` is the number of tasks of the array.
    """
    return retry_arrays(config, read_manifest(config.data), tasks, tokenizer_references(config))


def finalize(config: PrecomputeConfig) -> Manifest:
    """Enter the columns of the config into the manifest.

    Raises ShardError with the names of missing shards.
    """
    return finalize_columns(config.data, list(config.columns))


def estimate(config: PrecomputeConfig, clips: int = 16) -> Estimate:
    """Estimate disk space and time of what is left from the first `clips` clips. Writes nothing."""
    return estimate_cost(config, read_manifest(config.data), build_producers, clips)


def verify(config: PrecomputeConfig, sample: float = 0.01) -> list[ColumnCheck]:
    """Read the fraction `sample` of the finished shards and compare it with a recomputation.

    Writes nothing.
    """
    return verify_columns(config, read_manifest(config.data), build_producers, sample)
