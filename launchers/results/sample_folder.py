"""The output folder of `landiff sample`: one mp4 per unit, with what made it, and their list.

    NN-words-of-the-prompt-seedS.mp4   a finished video; its metadata are its record as JSON
    settings.json                      settings that all videos of the folder share
    samples.jsonl                      the records of all finished videos
    gallery.html, contact-sheet.png    all finished videos, see gallery.py
    drift/NAME.json                    joins and drift of a long video by chunk (DriftMeter)
    unfinished/NAME/                   codes and latents of a long video (stream_store.py)
    batch-size.json                    the choice of `batch_size: auto` with its measurement
    tokens/NAME.safetensors            codes of a video sampled with `tokens_only`

A video is committed by rename as soon as it is finished. A command whose models or options differ
from `settings.json` is refused, so that all videos of a folder are comparable.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from landiff.configs.base import ConfigError
from landiff.configs.documents import read_json
from landiff.configs.files import remove_abandoned, remove_dir, write_text
from landiff.data_pipeline.format.locks import locked
from landiff.data_pipeline.format.schema import content_fingerprint
from landiff.data_pipeline.video.codec import Mp4Writer, read_comment
from landiff.launchers.config import SampleConfig
from landiff.launchers.results.gallery import (
    Record,
    drift_path,
    pages_show,
    write_contact_sheet,
    write_gallery,
)
from landiff.launchers.results.prompts import SampleUnit
from landiff.launchers.version import __version__

SETTINGS = "settings.json"
SAMPLES = "samples.jsonl"
UNFINISHED = "unfinished"
TOKENS = "tokens"
BATCH_SIZE = "batch-size.json"
# Options that say what is generated, and where. All others say how, and are equal for all videos.
OPTIONS_OF_UNITS = (
    "zoo",
    "out",
    "device",
    "offload",
    "prompts",
    "prompts_file",
    "prompt_schedule",
    "vision",
    "first_frame",
    "continue_video",
    "tokens_from",
    "tokens_only",
    "seed",
    "seeds",
    "num_videos",
    "num_latent_frames",
    "motion_score",
)


def common_settings(config: SampleConfig, models: Mapping[str, str]) -> dict[str, Any]:
    """What all videos of a folder have in common.

    models: reference with fingerprint of each model.
    """
    settings = config.model_dump(mode="json", exclude=set(OPTIONS_OF_UNITS))
    if settings["tokens"]["context_segments"] is None:
        del settings["tokens"]["context_segments"]  # folders of earlier versions lack it
    if settings["size"] is None:
        del settings["size"]  # the same
    if settings["quantize"] == "none":
        del settings["quantize"]
    if not settings["compile_blocks"]:
        del settings["compile_blocks"]
    if not settings["split_guidance"]:
        del settings["split_guidance"]
    return settings | dict(models)


class SampleFolder:
    """Finished and missing videos of one output folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], units: Iterable[SampleUnit]):
        """Open `folder` for `units`.

        Raises ConfigError if it holds videos that were made with other settings, or another video
        under the name of a unit.
        """
        self.folder = folder
        self.settings = dict(settings)
        self.units = {unit.name: unit for unit in units}
        self._records: dict[str, Record] = {}
        self._others: set[str] = set()  # files without a record, made by something else
        with locked(folder):
            self._check_settings()
        remove_abandoned(folder)  # unfinished videos
        self.refresh()
        self._remove_finished_stores()
        for name, unit in self.units.items():
            record = self._records.get(name)
            if record is not None and record["key"] != unit.key:
                raise ConfigError(
                    f"{folder / name} is another video: its length, motion score, negative "
                    "prompt, schedule or given file differs; choose another folder (out=...)"
                )

    def _check_settings(self) -> None:
        """Compare with the settings of the videos that are here, or write them."""
        path = self.folder / SETTINGS
        if not path.exists():
            write_text(path, json.dumps(self.settings, indent=1, sort_keys=True) + "\n")
            return
        stored = read_json(path)
        changed = []
        for key in sorted(stored.keys() | self.settings.keys()):
            old, new = stored.get(key), self.settings.get(key)
            if old != new:
                changed.append(f"{key} = {json.dumps(old)} there, {json.dumps(new)} here")
        if changed:
            raise ConfigError(
                f"{self.folder} holds videos that were made with other settings: "
                f"{'; '.join(changed)}. Set them back, or choose another folder (out=...)"
            )

    def refresh(self) -> None:
        """Read the records of videos that were finished since, by this or another process."""
        for path in self.folder.glob("*.mp4"):
            if path.name in self._records or path.name in self._others:
                continue
            record = read_record(path)
            if record is None:
                self._others.add(path.name)
            else:
                self._records[path.name] = record

    def is_finished(self, unit: SampleUnit) -> bool:
        """Whether the video of a unit is here."""
        return unit.name in self._records

    def unfinished(self, units: Sequence[SampleUnit]) -> Path:
        """Folder of what is saved of a batch of long videos until they are finished."""
        return self.folder / UNFINISHED / units[0].name.removesuffix(".mp4")

    def tokens_path(self, unit: SampleUnit) -> Path:
        """File of the codes of a unit that were sampled before."""
        return self.folder / TOKENS / unit.name.replace(".mp4", ".safetensors")

    def batch_key(self, units: Sequence[SampleUnit]) -> str:
        """Identifies all that the frames of a batch depend on: its units, settings and version."""
        return content_fingerprint(self.settings, [unit.key for unit in units], __version__)

    def _remove_finished_stores(self) -> None:
        """Delete the stores of finished videos, which a kill can leave."""
        stores = self.folder / UNFINISHED
        remove_abandoned(stores)
        for path in stores.glob("[!.]*"):
            # The video that gives a batch its name is committed last.
            if f"{path.name}.mp4" in self._records:
                with contextlib.suppress(FileNotFoundError):  # another task deletes it
                    remove_dir(path)

    @contextmanager
    def writing(self, unit: SampleUnit, num_frames: int) -> Iterator[Mp4Writer]:
        """Writer of the video of a unit, which appears in the folder and its list at the end.

        The same frames give the same bytes: the record holds no times.
        """
        record = {
            "file": unit.name,
            "key": unit.key,
            "prompt": unit.prompt,
            "negative": unit.negative,
            "seed": unit.seed,
            "latent_frames": unit.num_latent_frames,
            "frames": num_frames,
            "motion_score": unit.motion_score,
            "settings": self.settings,
            "version": __version__,
        }
        if unit.given:
            record["given"] = asdict(unit.given)
        if unit.schedule:
            record["schedule"] = dict(unit.schedule)
        comment = json.dumps(record, ensure_ascii=False)
        path = self.folder / unit.name
        with Mp4Writer(path, num_frames, self.settings["fps"], comment=comment) as writer:
            yield writer
        self._records[unit.name] = record
        self.write_list()

    def write_drift(self, unit: SampleUnit, chunks: Sequence[Mapping[str, Any]]) -> None:
        """Write the report of the chunks of a long video, before the video is committed."""
        document = {"file": unit.name, "chunks": chunks}
        write_text(drift_path(self.folder, unit.name), json.dumps(document, indent=1) + "\n")

    @property
    def records(self) -> list[Record]:
        """Records of all finished videos, in order of their prompts, without common settings."""
        found = []
        for name in sorted(self._records, key=_position):
            record = dict(self._records[name])
            del record["settings"]
            found.append(record)
        return found

    def write_pages(self) -> None:
        """Write the list, the gallery and the contact sheet of all finished videos.

        The pages, for which all videos are read, are kept if they show the same videos already.
        """
        self.write_list()
        with locked(self.folder):
            records = self.records
            shown = content_fingerprint(records)
            if records and not pages_show(self.folder, shown):
                write_gallery(self.folder, records, self.settings)
                write_contact_sheet(self.folder, records, shown)

    def write_list(self) -> None:
        """Write samples.jsonl with all videos that are finished, those of other processes too."""
        with locked(self.folder):
            self.refresh()
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in self.records]
            write_text(self.folder / SAMPLES, "".join(lines))


def _position(name: str) -> tuple[int, str]:
    """Sort key of a file name: the number of its prompt, whose digits may be more than two."""
    number = name.partition("-")[0]
    return (int(number) if number.isdecimal() else 0), name


def recorded_batch_size(folder: Path) -> int | None:
    """The batch size of the videos of a folder, or chosen for it; None for a new folder."""
    for name in (SETTINGS, BATCH_SIZE):
        if (folder / name).exists():
            return int(read_json(folder / name)["batch_size"])
    return None


def agree_on_batch_size(folder: Path, chosen: int, seconds: Mapping[int, float]) -> int:
    """Records a choice, unless another task of the folder has recorded one. Returns that size.

    seconds: the measurement, seconds per video by batch size.
    """
    with locked(folder):
        recorded = recorded_batch_size(folder)
        if recorded is not None:
            return recorded
        document = {"batch_size": chosen, "seconds_per_video": seconds}
        write_text(folder / BATCH_SIZE, json.dumps(document, indent=1) + "\n")
    return chosen


def read_record(path: Path) -> Record | None:
    """The record inside a video of `landiff sample`; None for another or a damaged file."""
    try:
        record = json.loads(read_comment(path))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or "key" not in record:
        return None
    return record
