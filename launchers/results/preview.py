"""Videos for TensorBoard that are written outside a training loop: codec previews and samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from landiff.configs.disk_errors import naming
from landiff.data_pipeline.format.shards import read_part
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader
from landiff.data_pipeline.precompute.config import LatentsColumn, PrecomputeConfig
from landiff.data_pipeline.video.codec import ClipDecoder
from landiff.model_zoo import frozen
from landiff.model_zoo.frozen.base import posterior_mean
from landiff.training.checkpoint.run_folder import TENSORBOARD
from landiff.training.observe.event_file import EventFile
from landiff.training.observe.previews import write_video


def log_videos(folder: Path, step: int, videos_THWC: Mapping[str, Tensor], fps: float) -> None:
    """Appends uint8 videos [T, H, W, 3], by tag, to the TensorBoard log in `folder`."""
    with naming(folder), EventFile(folder) as writer:
        for tag, video in videos_THWC.items():
            write_video(writer, tag, video, step, fps)


def codec_round_trip(config: PrecomputeConfig, folder: Path, clips: int = 4) -> None:
    """Logs the first clips of a data folder, and the same clips decoded from their latents."""
    column = config.columns["latents"]
    assert isinstance(column, LatentsColumn), column
    codec = frozen.build(column.encoder, torch.device("cpu"))
    data = DataConfig(manifest=config.data, global_batch_size=1)
    loader = Loader(data, ["latents"], dp_rank=0, dp_size=1)
    with ClipDecoder(config.decoder) as decoder:
        for number in range(min(clips, loader.num_samples)):
            sample = next(iter(loader.next_batch().samples))
            mp4 = read_part(config.data, loader.manifest, sample.key, "mp4")
            frames_THWC = torch.from_numpy(decoder.decode(mp4, sha256=sample.meta.video_sha256))
            moments_1tChw = sample.tensors["latents"][None].float()
            decoded_1THWC = codec.decode(posterior_mean(moments_1tChw, codec.channels))
            videos_THWC = {"codec/input": frames_THWC, "codec/round trip": decoded_1THWC[0]}
            log_videos(folder / TENSORBOARD, number, videos_THWC, sample.meta.fps)
