"""The videos that `landiff sample` generates: units from prompts, prompt files and seeds.

A unit is one video of one prompt with one seed. Torch-free.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from landiff.configs.base import Config, ConfigError
from landiff.configs.documents import decode, parse_json, read_bytes
from landiff.configs.files import sha256_file
from landiff.configs.loader import validate
from landiff.launchers.config import GIVEN, SampleConfig
from landiff.model_zoo.frozen.checks import TIME
from landiff.model_zoo.sample.texts import Prompt, parse_schedule, schedule_text

MAX_PROMPT_BYTES = 64 << 20  # of a file of prompts
MAX_UNITS = 1_000_000
MAX_SLUG = 40  # characters of a prompt in the name of its mp4 file
SEED_STEP = 1000  # between the seeds of two prompts
MAX_SEED = (1 << 63) - 1  # the sampler counts on from a seed, and torch takes less than 2 ** 64
STDIN = "-"  # in place of a file of prompts
FORMATS = (".txt", ".csv", ".jsonl", ".schedule")
Texts = tuple[tuple[int, str], ...]  # by the RGB frame from which on they hold
TOKENS_SUFFIX = ".safetensors"  # of a file of tokens
SEEDS = re.compile(r"(\d{1,19})(?:-(\d{1,19}))?")


class PromptRow(Config):
    """One row of a file of prompts. Values that are not given are those of the config."""

    prompt: str = Field(default="", description="What the video shows.")
    schedule: str = Field(
        default="",
        description="In place of `prompt`, lines `FRAME: TEXT`: what the video shows from each RGB "
        "frame on.",
    )
    seed: NonNegativeInt | None = Field(default=None, description="Random seed of the video.")
    frames: PositiveInt | None = Field(default=None, description="Length in latent frames.")
    motion: NonNegativeFloat | None = Field(
        default=None, description="Motion score, in frame heights per second."
    )
    negative: str = Field(default="", description="What the video must not show.")
    first_frame: Path | None = Field(
        default=None, description="Image or video whose first frame the video begins with."
    )
    continue_video: Path | None = Field(default=None, description="Video that it continues.")
    tokens_from: Path | None = Field(
        default=None, description="Video, or file of tokens, whose tokens the video has."
    )

    def texts(self, place: str) -> Texts:
        """The texts of `schedule` by frame; none without one.

        Raises ConfigError for a wrong schedule, and unless there is either a prompt or a schedule.
        """
        if self.schedule.strip():
            if self.prompt.strip():
                raise ConfigError(f"{place} has a prompt and a schedule; remove one")
            return tuple(parse_schedule(self.schedule, place).items())
        if not self.prompt.strip():
            raise ConfigError(f"{place}: the prompt is empty; describe what the video shows")
        return ()


@dataclass(frozen=True)
class GivenFile:
    """A file that a video is given beside its text.

    kind: the key of the config, one of `GIVEN`.
    sha256: of the file.
    vision: name of the vision features that its tokens are computed with.
    """

    kind: str
    path: str
    sha256: str
    vision: str = ""


@dataclass(frozen=True)
class SampleUnit:
    """One video to generate.

    number: position of the prompt in the list of prompts.
    prompt: what the video shows, or all texts of a schedule in one line.
    num_latent_frames: length of the video.
    motion_score: in frame heights per second; None means the default of the sampler.
    negative: text of the unconditional branch, in place of no text.
    file: name of the mp4 file, in place of one made from number, prompt and seed.
    schedule: texts by the RGB frame from which on they hold, if the prompt changes.
    given: first frames or tokens.
    """

    number: int
    prompt: str
    seed: int
    num_latent_frames: int
    motion_score: float | None = None
    negative: str = ""
    file: str = ""
    schedule: Texts = ()
    given: GivenFile | None = None

    @property
    def texts(self) -> Prompt:
        """The prompt, or the texts of the schedule by frame."""
        return dict(self.schedule) if self.schedule else self.prompt

    @property
    def key(self) -> str:
        """16 hex digits that identify the content: equal for equal prompt, seed and options."""
        values = asdict(self)
        del values["number"], values["file"]
        if not self.schedule:
            del values["schedule"]  # videos of earlier versions lack it
        if self.given is None:
            del values["given"]
        else:
            del values["given"]["path"]
        text = json.dumps(values, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Name of the mp4 file: number, words of the prompt and seed, or `file`."""
        if self.file:
            return self.file
        slug = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:MAX_SLUG] or "prompt"
        return f"{self.number:02d}-{slug}-seed{self.seed}.mp4"


def sample_units(config: SampleConfig) -> list[SampleUnit]:
    """All units of a config, in order: each prompt with each of its seeds.

    Raises ConfigError for a file of prompts that cannot be read, a seed above `MAX_SEED`, or two
    equal units.
    """
    rows = [PromptRow(prompt=prompt) for prompt in config.prompts]
    if config.prompts_file is not None:
        rows = read_prompts(config.prompts_file)
    elif config.prompt_schedule:
        rows = [PromptRow(schedule="\n".join(config.prompt_schedule))]
    count = config.num_videos * max(1, len(config.seeds))
    if len(rows) * count > MAX_UNITS:
        raise ConfigError(
            f"{len(rows)} prompts with {count} videos each are more than {MAX_UNITS} videos; "
            "divide the file of prompts"
        )
    units: list[SampleUnit] = []
    hashes: dict[Path, str] = {}
    for number, row in enumerate(rows):
        given = _given(config, row, hashes)
        texts = row.texts("prompt_schedule" if config.prompt_schedule else f"prompt {number}")
        for seed in _seeds(config, row, number):
            unit = SampleUnit(
                number=number,
                prompt=schedule_text(dict(texts)) if texts else row.prompt,
                schedule=texts,
                given=given,
                seed=seed,
                num_latent_frames=row.frames or config.num_latent_frames,
                motion_score=config.motion_score if row.motion is None else row.motion,
                negative=row.negative,
            )
            units.append(unit)
    names: set[str] = set()
    for unit in units:
        if unit.seed > MAX_SEED:
            raise ConfigError(
                f"prompt {unit.number} has the seed {unit.seed}, above the largest, {MAX_SEED}; "
                "lower it"
            )
        if unit.name in names:
            raise ConfigError(
                f"prompt {unit.number} occurs twice with seed {unit.seed}; give each video a seed "
                "of its own"
            )
        names.add(unit.name)
    return units


def _given(config: SampleConfig, row: PromptRow, hashes: dict[Path, str]) -> GivenFile | None:
    """What a row is given, or else the config. Raises ConfigError for a file that is not there.

    hashes: those of files that were read before; the function adds to them.
    """
    found: list[tuple[str, Path]] = []
    for source in (row, config):
        if not found:
            found = [(key, getattr(source, key)) for key in GIVEN if getattr(source, key)]
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(key for key, _ in found)
        raise ConfigError(f"{names} exclude each other for {row.prompt!r}; leave one out")
    kind, path = found[0]
    if path not in hashes:
        try:
            hashes[path] = sha256_file(path)
        except OSError as error:
            raise ConfigError(f"{kind} = {path}: {error.strerror}") from None
    vision = ""
    if path.suffix != TOKENS_SUFFIX:
        if config.vision is None:
            raise ConfigError(
                f"{kind} = {path} needs the vision features that the tokenizer was trained on; "
                "set vision, to {kind: efficientnet-lite0} for instance"
            )
        vision = config.vision.model_dump_json()
    return GivenFile(kind, str(path), hashes[path], vision)


def sample_values(args: argparse.Namespace) -> dict[str, Any]:
    """Config values of the options of `landiff sample`. They are not parsed as YAML.

    Standard input is read here, once, and its lines become prompts like those of arguments. Raises
    ConfigError for seeds that are no numbers or ranges.
    """
    given = {"prompts": args.prompts, "--prompts FILE": args.prompts_file, "--at": args.at}
    sources = [name for name, value in given.items() if value]
    if len(sources) > 1:
        raise ConfigError(f"give {sources[0]} or {sources[1]}, not both")
    values: dict[str, Any] = {}
    if sources:
        values["prompts"] = args.prompts
        values["prompts_file"] = args.prompts_file
        if args.prompts_file == STDIN:
            values["prompts"] = stdin_prompts()
            values["prompts_file"] = None
        values["prompt_schedule"] = args.at or []
    for key in GIVEN:
        if getattr(args, key) is not None:
            values[key] = getattr(args, key)
    if args.tokens_only:
        values["tokens_only"] = True
    if args.seeds is not None:
        values["seeds"] = parse_seeds(args.seeds)
    if args.num_videos is not None:
        values["num_videos"] = args.num_videos
    if args.size is not None:
        values["size"] = args.size
    if args.frames is not None:
        if args.frames < 1 or (args.frames - 1) % TIME:
            raise ConfigError(f"--frames {args.frames} is not a multiple of {TIME} plus 1")
        values["num_latent_frames"] = (args.frames - 1) // TIME + 1
    return values


def _seeds(config: SampleConfig, row: PromptRow, number: int) -> list[int]:
    """The seeds of one prompt."""
    if row.seed is not None:
        first = [row.seed]
    elif config.seeds:
        first = list(config.seeds)
    else:
        first = [config.seed + SEED_STEP * number]
    seeds = []
    for seed in first:
        for repetition in range(config.num_videos):
            seeds.append(seed + repetition)
    return seeds


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds of `--seeds`: numbers and ranges such as `0-3,7`. Raises ConfigError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = SEEDS.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"--seeds {text!r}: {part!r} is neither a number nor a range A-B")
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise ConfigError(f"--seeds {text!r}: {part!r} is no range of rising numbers")
        if last - first >= MAX_UNITS:
            raise ConfigError(f"--seeds {text!r}: {part!r} has more than {MAX_UNITS} seeds")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds {text!r} names a seed twice")
    return tuple(seeds)


def stdin_prompts() -> list[str]:
    """The prompts of standard input, one per line. Raises ConfigError."""
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise ConfigError(f"standard input holds more than {MAX_PROMPT_BYTES} bytes of prompts")
    rows = _from_lines(decode(data, "standard input"), "standard input")
    return [row.prompt for row in rows]


def read_prompts(path: Path) -> list[PromptRow]:
    """The rows of a file of prompts.

    .txt has one prompt per line. .csv has a header, and .jsonl one object per line, with `prompt`
    or `schedule` and optionally `seed`, `frames`, `motion` and `negative`. Blank lines are skipped.
    .schedule has schedules, lines `FRAME: TEXT`, with a blank line between two. Raises ConfigError
    with file and line.
    """
    if str(path) == STDIN:
        raise ConfigError(
            f"prompts_file = {STDIN}: standard input is read with the option --prompts {STDIN}"
        )
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise ConfigError(
            f"prompts_file = {path}: the format is told by the suffix, one of {', '.join(FORMATS)}"
        )
    try:
        text = decode(read_bytes(path, MAX_PROMPT_BYTES), str(path))
    except OSError as error:
        raise ConfigError(f"prompts_file = {path}: {error.strerror}") from None
    if kind == ".txt":
        return _from_lines(text, str(path))
    if kind == ".csv":
        return _from_csv(text, str(path))
    if kind == ".schedule":
        return _from_schedules(text, str(path))
    return _from_jsonl(text, str(path))


def _row(values: dict[str, Any], place: str) -> PromptRow:
    """A checked row. Raises ConfigError with its place."""
    row = validate(PromptRow, values, place)
    row.texts(place)
    return row


def _found(rows: Sequence[PromptRow], origin: str) -> list[PromptRow]:
    """The rows as a list. Raises ConfigError if there is none."""
    if not rows:
        raise ConfigError(f"{origin} holds no prompt")
    return list(rows)


def _from_lines(text: str, origin: str) -> list[PromptRow]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            rows.append(_row({"prompt": line.strip()}, f"{origin}, line {number}"))
    return _found(rows, origin)


def _from_csv(text: str, origin: str) -> list[PromptRow]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        header = reader.fieldnames or ()
        doubled = [name for number, name in enumerate(header) if name in header[:number]]
        if doubled:
            raise ConfigError(f"{origin}: the header has the column {doubled[0]!r} twice")
        for cells in reader:
            place = f"{origin}, line {reader.line_num}"
            if None in cells:
                raise ConfigError(f"{place} has more cells than the header; quote commas")
            values = {key: value for key, value in cells.items() if value not in (None, "")}
            rows.append(_row(values, place))
    except csv.Error as error:
        raise ConfigError(f"{origin}, line {reader.line_num}: {error}") from None
    return _found(rows, origin)


def _from_jsonl(text: str, origin: str) -> list[PromptRow]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{origin}, line {number}"
        values = parse_json(line, place)
        if not isinstance(values, dict):
            raise ConfigError(f'{place}: a row is an object such as {{"prompt": "..."}}')
        rows.append(_row(values, place))
    return _found(rows, origin)


def _from_schedules(text: str, origin: str) -> list[PromptRow]:
    rows = []
    block: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.strip():
            block.append(line)
        elif block:
            place = f"{origin}, lines {number - len(block)} to {number - 1}"
            rows.append(_row({"schedule": "\n".join(block)}, place))
            block = []
    return _found(rows, origin)
