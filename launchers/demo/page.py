"""The page of `landiff demo`, built with Gradio.

Everything that a visitor sees of a video is HTML from launchers/pages/html.py, which escapes all
text. The page asks the server every half second how its job is; nothing depends on the connection.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from landiff.configs.base import ConfigError
from landiff.launchers.config import SampleConfig
from landiff.launchers.demo.jobs import Job, JobQueue
from landiff.launchers.demo.library import Library, Result
from landiff.launchers.demo.requests import (
    KEYS,
    MAX_PROMPT,
    MAX_SEED,
    MAX_STEPS,
    build_request,
    model_choices,
    video_lengths,
)
from landiff.launchers.pages.html import (
    Markup,
    details,
    element,
    figure,
    grid,
    media,
    preformatted,
)
from landiff.model_zoo import registry
from landiff.model_zoo.frozen.checks import TIME
from landiff.model_zoo.sample.generate import DEFAULT_MOTION_SCORE

TITLE = "LanDiff"
POLL_S = 0.5
SHOWN = 24  # results in the gallery
MAX_GUIDANCE = 20.0
MAX_MOTION = 1.0
CSS = """
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); }
figure { margin: 0; } figure video, .screen video, .screen img { width: 100%; }
.bad { color: #c62828; } .dim { opacity: .7; font-size: .9em; }
"""


class Page:
    """The functions behind the page. Each visitor has a job id, which the browser keeps."""

    def __init__(self, base: SampleConfig, queue: JobQueue, library: Library) -> None:
        self.base = base
        self.queue = queue
        self.library = library

    def generate(self, prompt: str, *values: Any) -> tuple[Any, ...]:
        """Adds a job. Returns its id, and what the page shows of it.

        values: of `KEYS`, then the path of the first frame, if the config has vision features.
        """
        given = {}
        if len(values) > len(KEYS) and values[-1] is not None:
            given["first_frame"] = Path(values[-1])
        return self._add({"prompt": prompt} | dict(zip(KEYS, values, strict=False)), given)

    def render_again(self, name: str, prompt: str, *values: Any) -> tuple[Any, ...]:
        """Adds a job with the tokens of a past result. Returns what `generate` does."""
        result = self.library.find(name)
        tokens = None if result is None else self.library.tokens_of(result)
        if result is None or tokens is None:
            text = "choose one of the videos so far whose tokens are there"
            return gr.skip(), element("div", text, class_="bad"), gr.skip(), gr.skip()
        chosen = {"prompt": prompt} | dict(zip(KEYS, values, strict=False))
        # What the tokens were sampled for.
        chosen["num_latent_frames"] = result.record["latent_frames"]
        for kind in ("lm", "tokenizer"):
            chosen[kind] = result.record["settings"][kind]
        return self._add(chosen, {"tokens_from": tokens})

    def _add(self, values: Mapping[str, Any], given: Mapping[str, Path]) -> tuple[Any, ...]:
        """Adds a job. Returns its id, state and picture, and the timer; or the problem."""
        try:
            job = self.queue.add(build_request(self.base, values, given))
        except ConfigError as error:
            return gr.skip(), element("div", str(error), class_="bad"), gr.skip(), gr.skip()
        return job.id, *self.progress(job.id)[:2], gr.Timer(active=True)

    def progress(self, job_id: str) -> tuple[Any, ...]:
        """State and picture of a job, the gallery if the job has ended, and the timer."""
        job = self.queue.find(job_id)
        if job is None:
            return "", "", self.gallery(), gr.Timer(active=False)
        state = self._state(job)
        if not job.has_ended:
            picture = gr.skip()
            if job.preview is not None:
                picture = _screen(media(job.preview, "jpeg", "first, middle and last frame"))
            return state, picture, gr.skip(), gr.Timer(active=True)
        picture = ""
        if job.state == "finished":
            path = job.request.path
            found = self.library.find(f"{path.parent.name}/{path.name}")
            picture = _screen(_video(found), _settings(found)) if found else ""
        return state, picture, self.gallery(), gr.Timer(active=False)

    def cancel(self, job_id: str) -> tuple[Any, ...]:
        """Cancels the job of a visitor."""
        self.queue.cancel(job_id)
        return self.progress(job_id)

    def gallery(self) -> Markup:
        """The newest results."""
        figures = []
        for result in self.library.results()[:SHOWN]:
            record = result.record
            note = f"seed {record['seed']}, {record['frames']} frames"
            caption = [element("div", record["prompt"]), element("div", note, class_="dim")]
            figures.append(figure(_video(result, autoplay=False), _joined(caption, result)))
        return grid(figures)

    def names(self) -> Any:
        """The list of past results, to choose one."""
        choices = []
        for result in self.library.results():
            record = result.record
            choices.append((f"{record['prompt'][:80]} (seed {record['seed']})", result.name))
        return gr.Dropdown(choices=choices)

    def settings_of(self, name: str) -> list[Any]:
        """Prompt and values of a past result, for the inputs of the page."""
        result = self.library.find(name)
        if result is None:
            return [gr.skip()] * (1 + len(KEYS))
        record = result.record | result.record["settings"]
        record["num_latent_frames"] = record["latent_frames"]
        if record["motion_score"] is None:
            record["motion_score"] = DEFAULT_MOTION_SCORE
        return [record["prompt"], *[record[key] for key in KEYS]]

    def _state(self, job: Job) -> Markup:
        """The state of a job in one line, with a bar of its progress."""
        if job.state == "waiting":
            return element("div", f"waiting: {self.queue.jobs_before(job)} before this one")
        if job.state == "failed":
            return element("div", f"failed: {job.error}", class_="bad")
        if job.state == "running":
            bar = element("progress", value=f"{job.fraction:.4f}", max="1")
            stopping = "cancelling; " if job.is_cancelled else ""
            return element("div", bar, f" {stopping}{job.progress}")
        return element("div", job.state)


def build_page(page: Page) -> gr.Blocks:
    """Inputs on the left, the video of the visitor on the right, all videos below."""
    base = page.base
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        job_id = gr.BrowserState("", storage_key="landiff-demo-job")
        timer = gr.Timer(POLL_S, active=False)
        with gr.Row():
            with gr.Column():
                inputs = _inputs(base)
                first_frame = []
                if base.vision is not None:
                    # Not gr.Image, which decodes the file in this process.
                    picture = gr.File(
                        type="filepath", label="First frame: a picture", elem_id="first-frame"
                    )
                    first_frame.append(picture)
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    cancel = gr.Button("Cancel", elem_id="cancel")
            with gr.Column():
                state = gr.HTML(elem_id="state")
                screen = gr.HTML(elem_id="screen")
        with gr.Row():
            past = gr.Dropdown([], label="Videos so far", elem_id="past")
            reuse = gr.Button("Use its settings", elem_id="reuse")
            again = gr.Button("Render its tokens again", elem_id="again")
        gallery = gr.HTML(elem_id="gallery")

        shown = [state, screen, gallery, timer]

        def on(
            event: Callable[..., Any], call: Callable[..., Any], given: Any, changed: Any
        ) -> Any:
            return event(
                call, given, changed, queue=False, show_progress="hidden", api_visibility="private"
            )

        started = [job_id, state, screen, timer]
        on(generate.click, page.generate, inputs + first_frame, started)
        on(again.click, page.render_again, [past, *inputs], started)
        on(cancel.click, page.cancel, [job_id], shown)
        on(timer.tick, page.progress, [job_id], shown)
        on(blocks.load, page.progress, [job_id], shown)
        on(past.focus, page.names, None, [past])
        on(reuse.click, page.settings_of, [past], inputs)
    return blocks


def _inputs(base: SampleConfig) -> list[Any]:
    """The inputs: the prompt, then `KEYS` in order."""
    lengths = []
    for length in video_lengths(base):
        frames = 1 + TIME * (length - 1)
        lengths.append((f"{frames} frames, {frames / base.fps:.1f} s", length))
    motion = DEFAULT_MOTION_SCORE if base.motion_score is None else base.motion_score
    prompt = base.prompts[0] if base.prompts else ""
    found: list[Any] = [
        gr.Textbox(prompt, label="Prompt", lines=3, max_length=MAX_PROMPT, elem_id="prompt"),
        gr.Number(
            base.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed"
        ),
        gr.Dropdown(lengths, value=base.num_latent_frames, label="Length", elem_id="length"),
        gr.Slider(0, MAX_GUIDANCE, value=base.guidance, label="Guidance", elem_id="guidance"),
        gr.Slider(0, MAX_MOTION, value=motion, step=0.01, label="Motion, frame heights per second"),
        gr.Slider(2, MAX_STEPS, value=base.steps, step=1, label="Sampling steps", elem_id="steps"),
    ]
    names = {"lm": "Language model", "tokenizer": "Tokenizer", "diffusion": "Diffusion model"}
    with gr.Accordion("Models", open=False):
        for kind, label in names.items():
            entry = registry.resolve(base.zoo, getattr(base, kind), kind)
            choices = model_choices(base.zoo, kind)
            found.append(gr.Dropdown(choices, value=entry.reference, label=label, elem_id=kind))
    return found


def _video(result: Result, *, autoplay: bool = True) -> Markup:
    """The player of a video."""
    return element(
        "video",
        src=f"/videos/{quote(result.name)}",
        aria_label=result.record["prompt"],
        controls=True,
        loop=result.record["frames"] > 1,  # Chromium shows no frame of a single one that loops
        muted=True,
        autoplay=autoplay,
        preload="metadata",
    )


def _settings(result: Result) -> Markup:
    """All that made a video, to be folded out."""
    return details(
        "Settings", preformatted(json.dumps(result.record, indent=1, ensure_ascii=False))
    )


def _joined(caption: Sequence[Markup], result: Result) -> Markup:
    """A caption with the settings below."""
    return element("div", list(caption), _settings(result))


def _screen(*parts: Markup) -> Markup:
    """The large picture of the page."""
    return element("div", list(parts), class_="screen")
