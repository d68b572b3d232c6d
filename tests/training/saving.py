"""Write the checkpoint files of an engine at once, without the store."""

from pathlib import Path

import torch.distributed as dist

from landiff.training.checkpoint.parts import write_files
from landiff.training.engine import Engine


def save(engine: Engine, folder: Path) -> None:
    """Write the files of all ranks into a folder, which need not exist."""
    files = engine.state_files()
    for file in files:
        (folder / file.path).unlink(missing_ok=True)  # may be mapped into memory
    write_files(folder, files)
    if dist.is_initialized():
        dist.barrier()
