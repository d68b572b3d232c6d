"""The commands `landiff shapes` and `landiff fit-codec`."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landiff.configs.base import ConfigError
from landiff.configs.documents import parse_json
from landiff.configs.files import write_text

if TYPE_CHECKING:
    import numpy as np
    import torch

    from landiff.data_pipeline.synthetic.judge import Rates
    from landiff.model_zoo.frozen.refinement import RefinementOptions

CLIPS_PER_PASS = 32  # of fit-codec
COLUMNS = 6  # of an animated picture


def shapes_command(args: argparse.Namespace) -> int:
    """Writes clips of the shapes world, or scores or shows videos of it. Returns the exit code."""
    if args.action in ("score", "show") and (args.videos is None or args.labels is None):
        raise ConfigError(f"landiff shapes {args.action} needs --videos FOLDER and --labels FILE")
    if args.action == "show":
        from landiff.launchers.results.shapes_page import judged_videos, write_animation

        if args.out is None or not args.out.endswith(".gif"):
            raise ConfigError("landiff shapes show needs --out FILE.gif")
        videos = judged_videos(Path(args.videos), Path(args.labels), args.count)
        write_animation(Path(args.out), videos, COLUMNS)
        print(f"shapes: wrote {len(videos)} videos to {args.out}")
        return 0
    if args.action == "score":
        if args.chunks < 1:
            raise ConfigError(f"--chunks {args.chunks}: a video has at least one")
        result = score(Path(args.videos), Path(args.labels), args.details, args.chunks)
        if args.out is not None:
            write_text(Path(args.out), json.dumps(result, indent=1))
        print(format_rates(result))
        return 0
    from landiff.data_pipeline.synthetic import world

    if args.out is None:
        raise ConfigError(f"landiff shapes {args.action} needs --out FOLDER")
    out = Path(args.out)
    if args.action == "make":
        world.write_world(
            out,
            clips=args.clips,
            true_clips=args.true_clips,
            size=args.size,
            num_frames=args.frames,
            seed=args.seed,
        )
    else:
        world.write_pairs(out, clips=args.clips, size=args.size, seed=args.seed)
    print(f"shapes: wrote {args.clips} clips to {out}")
    return 0


def score(
    videos: Path, labels: Path, details: str | None = None, chunks: int = 1
) -> dict[str, Any]:
    """Rates of the videos in a folder against a labels file, as a JSON document.

    chunks: of each video; with several, the document has `kept` as well, how often all chunks show
    the same.
    """
    from landiff.data_pipeline.synthetic.judge import judge, keeps, rates

    rows = read_rows(labels)
    if rows and "objects" in rows[0]:
        return score_pairs(videos, rows)
    verdicts = []
    kept = []
    for frames_THWC in read_videos(pair_files(videos, rows)):
        verdicts.append(judge(frames_THWC))
        if chunks > 1:
            kept.append(keeps(frames_THWC, chunks))
    if details is not None:
        lines = []
        for row, verdict in zip(rows, verdicts, strict=True):
            lines.append(json.dumps({**row, **asdict(verdict)}) + "\n")
        write_text(Path(details), "".join(lines))
    document = rates_document(rates(rows, [verdict.found for verdict in verdicts]))
    if kept:
        document["kept"] = {"chunks": chunks, **kept_rates(kept)}
    return document


def kept_rates(kept: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """Fraction of videos that keep each attribute, and all of them."""
    found = {name: sum(one[name] for one in kept) / len(kept) for name in kept[0]}
    return {**found, "all": sum(all(one.values()) for one in kept) / len(kept)}


def score_pairs(videos: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates over the objects of the second tier, and of videos with `both` objects right.

    rows: `objects`, two labels for each video.
    """
    from landiff.data_pipeline.synthetic.judge import rates
    from landiff.data_pipeline.synthetic.pair_judge import both_right, judge_pair, match

    wanted = []
    found = []
    right = 0
    for row, frames_THWC in zip(rows, read_videos(pair_files(videos, rows)), strict=True):
        seen = judge_pair(frames_THWC)
        matched = match(row["objects"], seen)
        right += both_right(row["objects"], matched, len(seen))
        wanted += row["objects"]
        found += matched
    return {**rates_document(rates(wanted, found)), "pairs": len(rows), "both": right / len(rows)}


def rates_document(rates: Rates) -> dict[str, Any]:
    """Rates as a JSON document, with chance and 95 % intervals."""
    from landiff.data_pipeline.synthetic.judge import chance, interval

    right = {**rates.right, "all": rates.all_right}
    intervals = {name: interval(rate, rates.videos) for name, rate in right.items()}
    return {
        "videos": rates.videos,
        "right": right,
        "interval": intervals,
        "shuffled": dict(rates.shuffled),
        "chance": chance(),
        "unsaid": dict(rates.unsaid),
        "confusion": rates.confusion,
    }


def format_rates(document: Mapping[str, Any]) -> str:
    """Rates as a table: one line for each attribute."""
    counted = f"{document['videos']} videos"
    if "both" in document:
        counted = f"{document['pairs']} videos of two objects; rates of objects"
    lines = [counted, f"{'':<12}right  95 % interval  shuffled  chance"]
    for name, rate in document["right"].items():
        low, high = document["interval"][name]
        shuffled = document["shuffled"][name]
        chance = document["chance"][name]
        lines.append(
            f"{name:<12}{rate:>5.3f}  {low:.3f} - {high:.3f}  {shuffled:>8.3f}  {chance:>6.3f}"
        )
    if "both" in document:
        lines.append(
            f"{document['both']:.3f} of {document['pairs']} videos show both objects as asked"
        )
    if "kept" in document:
        kept = dict(document["kept"])
        parts = [f"over {kept.pop('chunks')} chunks the same"]
        parts += [f"{name} {rate:.3f}" for name, rate in kept.items()]
        lines.append(", ".join(parts))
    return "\n".join(lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            rows.append(parse_json(line, str(path)))
    return rows


def pair_files(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """The video of each row: its `file`, else the mp4 whose name starts with the row's number.

    `landiff sample` names videos in the second way. Raises ConfigError if one is missing.
    """
    by_number = {}
    for path in sorted(folder.glob("*.mp4")):
        number = re.match(r"\d+", path.name)
        if number is not None:
            by_number[int(number.group())] = path
    found = []
    for index, row in enumerate(rows):
        named = folder / str(row.get("file", ""))
        if named.is_file():
            found.append(named)
        elif index in by_number:
            found.append(by_number[index])
        else:
            raise ConfigError(f"{folder} holds no video for label {index} of {len(rows)}")
    return found


def read_videos(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """All frames of each file, uint8 [T, H, W, 3]."""
    from landiff.data_pipeline.video.codec import ClipDecoder

    with ClipDecoder("pyav") as decoder:
        for path in paths:
            yield decoder.decode(path.read_bytes())


def fit_codec_command(args: argparse.Namespace) -> int:
    """Fits a PCA codec to clips of one shape and trains its refinement. Returns the exit code."""
    from landiff.model_zoo.frozen import pca
    from landiff.model_zoo.frozen.config import PcaConfig
    from landiff.model_zoo.frozen.refinement import RefinementOptions

    paths = []
    for folder in args.clips:
        found = sorted(Path(folder).glob("*.mp4"))[: args.limit]
        if not found:
            raise ConfigError(f"--clips {folder} holds no *.mp4")
        paths += found
    if not 0 <= args.whiten <= 1:
        raise ConfigError(f"--whiten {args.whiten:g} is a power from 0 to 1")
    if args.refine < 0:
        raise ConfigError(f"--refine {args.refine} is a number of steps, 0 or more")
    if args.codec is not None and not args.refine:
        raise ConfigError(f"--codec {args.codec} needs --refine STEPS, which trains its refinement")
    started = time.process_time()
    if args.codec is not None:
        weights = pca.build(PcaConfig(path=args.codec), "cpu").state_dict()
    else:
        weights = pca.fit(_batches(paths), args.channels, args.whiten)
    if args.refine:
        weights = _refined(
            weights, paths, RefinementOptions(args.refine, args.seed, bfloat16=args.bf16)
        )
    pca.write(weights, Path(args.out))
    seconds = time.process_time() - started
    print(f"fit-codec: {args.out} from {len(paths)} clips in {seconds:.1f} CPU seconds")
    return 0


def _refined(
    weights: dict[str, torch.Tensor], paths: Sequence[Path], options: RefinementOptions
) -> dict[str, torch.Tensor]:
    """Weights with a refinement that was trained on clips.

    All clips are held in memory. Raises ConfigError for clips of several sizes.
    """
    import torch

    from landiff.launchers.progress import ProgressLine
    from landiff.model_zoo.frozen import pca

    clips: list[torch.Tensor] = []
    for path, frames in zip(paths, read_videos(paths), strict=True):
        clip_THWC = torch.from_numpy(frames)
        if clips and clip_THWC.shape[1:] != clips[0].shape[1:]:
            sizes = [f"{clip.shape[1]} x {clip.shape[2]}" for clip in (clip_THWC, clips[0])]
            raise ConfigError(
                f"{path} has frames of {sizes[0]}, {paths[0]} of {sizes[1]}; give clips of one size"
            )
        clips.append(clip_THWC)
    return pca.refine(weights, clips, options, ProgressLine("fit-codec", "steps"))


def _batches(paths: Sequence[Path]) -> Iterator[torch.Tensor]:
    """Clips in batches, uint8 [B, T, H, W, 3]."""
    import numpy as np
    import torch

    for first in range(0, len(paths), CLIPS_PER_PASS):
        frames = list(read_videos(paths[first : first + CLIPS_PER_PASS]))
        yield torch.from_numpy(np.stack(frames))
