"""The original video of held-out clips in previews, read from real raw shards."""

import io
import logging

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional

from landiff.data_pipeline.format.columns import AlignedColumns
from landiff.data_pipeline.loading.held_out import HeldOutClips
from landiff.data_pipeline.loading.samples import Sample
from landiff.data_pipeline.loading.split import HeldOutClip
from landiff.training.engine import TrainState
from landiff.training.observe.metrics import Metrics
from landiff.training.observe.previews import Preview, SourceFrames, SourcePanels
from landiff.training.tokenizer.engine import TokenizerEngine
from tests.data_pipeline.precompute_data import key_of, pan, write_clips
from tests.training.tokenizer.test_engine import train
from tests.training.tokenizer.tiny import META, config, features
from tests.training.toy import alone

GREY = torch.full((5, 32, 32, 3), 128, dtype=torch.uint8)


def held_out(folder, clips):
    """The first clips of a data set, with the last one first."""
    columns = AlignedColumns(folder, write_clips(folder, [clips]), [])
    order = [clips - 1, *range(clips - 1)]
    return HeldOutClips([columns], [HeldOutClip(0, key_of(at), 0, 0, at) for at in order])


def shown_frames(panel_THWC, clip):
    """Which frame of `pan(clip)` each frame of a panel is."""
    size = panel_THWC.shape[1:3]
    video_TCHW = torch.from_numpy(pan(clip)).movedim(-1, 1).float()
    sized_TCHW = functional.interpolate(video_TCHW, size, mode="bilinear", align_corners=False)
    frames = []
    for frame_HWC in panel_THWC:
        distance_T = (sized_TCHW - frame_HWC.movedim(-1, 0)).abs().mean((1, 2, 3))
        assert distance_T.min() < 15  # compression; the next frame is above 20
        frames.append(int(distance_T.argmin()))
    return frames


def test_the_frames_that_the_other_panels_show_stand_first(tmp_path):
    clips = held_out(tmp_path, 3)
    semantic = Preview("preview/held_out_0", {"features": GREY}, "text", SourceFrames(0, 4, 2))
    decoded = Preview("preview/held_out_2", {"sampled": GREY}, "text", SourceFrames(2))
    prompt = Preview("preview/prompt_0", {"sampled": GREY}, "text")
    panels = SourcePanels()
    for _ in range(2):  # the second time without decoding
        first, second, third = panels.added([semantic, decoded, prompt], clips)
        clips.clips.clear()
    assert list(first.panels) == ["source", "features"]
    assert first.panels["source"].shape == first.panels["features"].shape == (5, 160, 160, 3)
    assert shown_frames(first.panels["source"], clip=2) == [4, 6, 8, 10, 12]
    assert shown_frames(second.panels["source"], clip=1) == [0, 1, 2, 3, 4]
    assert list(third.panels) == ["sampled"]


def test_a_clip_that_cannot_be_decoded_costs_its_panel_and_one_warning(tmp_path, caplog):
    clips = held_out(tmp_path, 1)
    (shard,) = (tmp_path / "raw").glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[600:1200] = bytes(600)  # of the video, after its header
    shard.write_bytes(content)
    metrics = Metrics(tmp_path / "run", 2, alone(), io.StringIO())
    metrics.resume(TrainState())
    preview = Preview("preview/held_out_0", {"sampled": GREY}, "text", SourceFrames(0))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            metrics.add_previews(TrainState(step), [preview], clips)
    metrics.close()
    (record,) = caplog.records
    assert "preview/held_out_0 is shown without its original video: damaged" in record.getMessage()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [image.step for image in events.Images("preview/held_out_0")] == [1, 2]


def test_the_tokenizer_names_the_frames_of_the_segment_it_shows(tmp_path):
    engine = TokenizerEngine(config(tmp_path), alone())
    train(engine, range(1))
    longer = torch.cat([features(0), features(1)])[:5]  # 17 frames of video
    clips = []
    meta = META.model_copy(update={"num_frames": 17})
    for index in range(12):
        clips.append(Sample(str(index), 0, index, index, meta, {"features": longer}))
    previews = engine.preview(clips)
    assert {preview.source.first for preview in previews} == {0, 4, 8}
    assert {preview.source.step for preview in previews} == {4}
    for clip, preview in zip(clips, previews, strict=True):
        start = preview.source.first // 4
        assert preview.source.clip == clip.position
        assert torch.equal(engine._features((clip,))[0], longer[start : start + 3].float())
