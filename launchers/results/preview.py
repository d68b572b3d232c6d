"""Videos for TensorBoard from outside a training loop: what went into the codec, what came out, samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from landiff.configs.disk_errors import naming
from landiff.data_pipeline.format.shards import read_part
from landiff.data_pipeline.loading.config import DataConfig
from landiff.data_pipeline.loading.loader import Loader
from landiff.data_pipeline.precompute.config import PrecomputeConfig
from landiff.data_pipeline.video.codec import ClipDecoder
from landiff.model_zoo import frozen
from landiff.model_zoo.frozen.base import posterior_mean
from landiff.training.observe.event_file import EventFile
from landiff.training.observe.previews import write_video


def log_videos(folder: Path, step: int, videos_THWC: Mapping[str, Tensor], fps: float) -> None:
    """Append uint8 videos to the TensorBoard log in `folder`, by tag."""
    with naming(folder), EventFile(folder) as writer:
        for tag, video in videos_THWC.items():
            write_video(writer, tag, video, step, fps)


def codec_round_trip(config: PrecomputeConfig, folder: Path, clips: int = 4) -> None:
    """The first clips as they went in, and as their latents decode."""
    codec = frozen.build(config.columns["latents"].encoder, torch.device("cpu"))
    loader = Loader(
        DataConfig(manifest=config.data, global_batch_size=1), ["latents"], dp_rank=0, dp_size=1
    )
    with ClipDecoder(config.decoder) as decoder:
        for number in range(min(clips, loader.num_samples)):
            sample = next(loader.next_batch().samples)
            frames = torch.from_numpy(
                decoder.decode(
                    read_part(config.data, loader.manifest, sample.key, "mp4"),
                    sha256=sample.meta.video_sha256,
                )
            )
            decoded = codec.decode(
                posterior_mean(sample.tensors["latents"][None].float(), codec.channels)
            )[0]
            log_videos(
                folder / "tensorboard",
                number,
                {"codec/input": frames, "codec/round trip": decoded},
                sample.meta.fps,
            )
