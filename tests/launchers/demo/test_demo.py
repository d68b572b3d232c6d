"""`landiff demo` in a real browser, with models of random weights."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from landiff.configs.base import ConfigError
from landiff.data_pipeline.video.codec import spaced_frames
from landiff.launchers.cli import main
from landiff.launchers.demo.jobs import MAX_WAITING, JobQueue
from landiff.launchers.demo.library import Library, Result
from landiff.launchers.demo.requests import MAX_PROMPT, build_request, model_choices
from landiff.launchers.demo.server import DemoServer, is_local, listen
from landiff.launchers.demo.worker import JobProgress
from tests.launchers.demo.browser import Browser, Tab
from tests.launchers.random_zoo import sample_config, write_random_zoo

HOSTILE = "<img src=x onerror=alert(1)>${1+1}{{7*7}} ../../etc/passwd 🐇 \u202e雪"
MANY_STEPS = "200"  # so that there is time to cancel, at STEP_S or more for each
STEP_S = 0.05


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    zoo = write_random_zoo(folder / "zoo")
    vision = {"kind": "efficientnet-lite0"}
    return sample_config(zoo, folder / "out", prompts=("a fox",), vision=vision)


@pytest.fixture(scope="module")
def server(base) -> Iterator[DemoServer]:
    found = DemoServer(base, "127.0.0.1", 0)
    thread = threading.Thread(target=found.run)
    thread.start()
    yield found
    found.queue.close()
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture
def user(server, browser) -> Tab:
    return visit(server, browser)


def visit(server: DemoServer, browser: Browser) -> Tab:
    """A new visitor, who sees the whole page."""
    tab = browser.new_user(server.address)
    tab.wait_for("document.querySelector('#generate') !== null")
    # Clicks count once all scripts are loaded, which the page does piece by piece.
    loaded = "performance.getEntriesByType('resource').map(entry => entry.responseEnd)"
    tab.wait_for(f"performance.now() - Math.max(...{loaded}) > 1000")
    return tab


def values_of(base, **changed) -> dict[str, object]:
    """What the page sends for the given config."""
    found = {kind: model_choices(base.zoo, kind)[0] for kind in ("lm", "tokenizer", "diffusion")}
    return {"prompt": "a fox", "seed": 1, "num_latent_frames": 1} | found | changed


def plays(tab: Tab) -> None:
    """Waits until the large video of a page is loaded and its first frame is shown."""
    video = "document.querySelector('#screen video')"
    tab.wait_for(f"{video}?.readyState >= 2 && {video}.videoWidth > 0")


def test_a_video_is_generated_and_plays_and_its_settings_are_shown(user, server, base):
    user.fill("#prompt textarea", "a white rabbit")
    user.click("#generate")
    user.wait_for_text("#state", "finished")
    plays(user)
    (result,) = Library(base.out).results()
    assert result.record["prompt"] == "a white rabbit" and result.record["seed"] == base.seed
    user.wait_for_text("#gallery", "a white rabbit")
    user.click("#screen summary")
    user.wait_for_text("#screen", '"guidance"')
    render_again(user, base, result)
    # Nothing is asked of other hosts: the page works offline and tells nobody what is generated.
    assert user.hosts == {server.address.removeprefix("http://")}


def render_again(user: Tab, base, first: Result) -> None:
    """Renders the tokens of a result with another prompt."""
    user.click("#past input")
    user.click("[role=option]")
    user.fill("#prompt textarea", "the same in blue")
    user.click("#again")
    user.wait_for("document.querySelector('#gallery').innerText.includes('the same in blue')")
    library = Library(base.out)
    (second,) = [found for found in library.results() if found.name != first.name]
    assert library.tokens_of(first) == library.tokens_of(second) is not None
    assert second.record["prompt"] == "the same in blue"
    assert (base.out / second.name).read_bytes() != (base.out / first.name).read_bytes()


def test_a_video_begins_with_an_uploaded_picture(user, base, tmp_path):
    """A file that is no picture is refused."""
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (150, 120), (200, 30, 40)).save(tmp_path / "red.png")
    user.fill("#prompt textarea", "from a red picture")
    remove = "#first-frame [aria-label*=emove], #first-frame [aria-label*=lear]"
    uploaded = f"document.querySelector({json.dumps(remove)}) !== null"
    user.upload("#first-frame input[type=file]", tmp_path / "text.png")
    user.wait_for(uploaded)
    user.click("#generate")
    user.wait_for_text("#state", "cannot be decoded")
    user.click(remove)
    user.wait_for("document.querySelector('#first-frame input[type=file]') !== null")
    user.upload("#first-frame input[type=file]", tmp_path / "red.png")
    user.wait_for(uploaded)
    user.click("#generate")
    user.wait_for_text("#state", "finished")
    (result,) = [found for found in Library(base.out).results() if "red" in found.name]
    assert result.record["given"]["kind"] == "first_frame"
    first_HWC = spaced_frames(base.out / result.name, 1)[0]
    assert np.abs(first_HWC.astype(int) - (200, 30, 40)).max() <= 8  # of the codec and H.264


def test_a_hostile_prompt_is_text(user, base):
    user.fill("#prompt textarea", HOSTILE)
    user.click("#generate")
    user.wait_for_text("#state", "finished")
    user.wait_for_text("#gallery", HOSTILE)
    assert user.evaluate("document.querySelectorAll('#gallery img, #screen img').length") == 0
    assert not [event for event in user.events if "javascriptDialog" in event["method"]]
    (result,) = [found for found in Library(base.out).results() if "onerror" in found.name]
    assert (base.out / result.name).resolve().parent.parent == base.out.resolve()
    user.fill("#prompt textarea", "   ")
    user.click("#generate")
    user.wait_for_text("#state", "the prompt is empty")


@pytest.fixture
def slow_steps(monkeypatch):
    """Sampling steps that last at least `STEP_S`, as those of larger models do."""
    report = JobProgress.__call__

    def report_and_wait(progress: JobProgress, what: str, done: int, total: int) -> None:
        report(progress, what, done, total)
        if what == "latents":
            time.sleep(STEP_S)

    monkeypatch.setattr(JobProgress, "__call__", report_and_wait)


@pytest.mark.usefixtures("slow_steps")
def test_two_users_wait_for_each_other_and_a_reload_finds_the_video(user, server, browser, base):
    """The first is cancelled in the middle, after its picture was seen; the second then starts."""
    other = visit(server, browser)
    user.fill("#prompt textarea", "never finished")
    user.fill("#steps input[type=number]", MANY_STEPS)
    user.click("#generate")
    user.wait_for_text("#state", "sampling step")
    other.fill("#prompt textarea", "after the first")
    other.click("#generate")
    other.wait_for_text("#state", "waiting: 1 before this one")
    user.wait_for("document.querySelector('#screen img')?.naturalWidth > 0")
    user.reload()
    user.wait_for_text("#state", "sampling step")
    user.click("#cancel")
    user.wait_for_text("#state", "cancelled")
    other.reload()
    other.wait_for_text("#state", "finished")
    plays(other)
    prompts = [result.record["prompt"] for result in Library(base.out).results()]
    assert "after the first" in prompts and "never finished" not in prompts
    assert not list(base.out.rglob("*.tmp"))


def get(server: DemoServer, path: str, **headers: str) -> tuple[int, bytes]:
    """Status and body of a request whose path is sent as it is."""
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=60)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read()


def test_only_finished_videos_are_served(server, base):
    secret = base.out / "secret.mp4"
    secret.write_bytes(b"not of the demo")
    folder = next(path for path in base.out.iterdir() if path.is_dir())
    (folder / "foreign.mp4").write_bytes(b"not of the demo")
    weights = next(base.zoo.rglob("*.safetensors"))
    here = Path(__file__).resolve()
    for path in (
        "/videos/../secret.mp4",
        "/videos/..%2fsecret.mp4",
        "/videos/%2e%2e/secret.mp4",
        f"/videos/{folder.name}/..%2f..%2fsecret.mp4",
        f"/videos/{folder.name}/foreign.mp4",
        f"/videos/{folder.name}/settings.json",
        f"/videos/{folder.name}%2fsettings.json",
        f"/gradio_api/file={secret}",
        f"/gradio_api/file={weights}",
        f"/gradio_api/file={here}",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=setup.py",
        "/file=/etc/passwd",
        "/static/../../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2f..%2fetc/passwd",
        "/theme.css/../../etc/passwd",
    ):
        status, body = get(server, path)
        assert status in (400, 403, 404), (path, status)
        assert b"root:" not in body and b"not of the demo" not in body, path


def test_requests_of_other_sites_are_refused(server):
    host = server.address.removeprefix("http://")
    assert get(server, "/config")[0] == 200
    assert get(server, "/config", Origin=server.address)[0] == 200
    assert get(server, "/config", Origin="http://example.com")[0] == 403
    assert get(server, "/config", Host="example.com")[0] == 400
    assert get(server, "/config", Host=host)[0] == 200


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": None}, "empty"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, "characters"),
        ({"prompt": "\ud800"}, "UTF-8"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 40}, "seed"),
        ({"seed": float("nan")}, "seed"),
        ({"steps": 10**6}, "steps"),
        ({"num_latent_frames": 10**6}, "not offered"),
        ({"guidance": "high"}, "guidance"),
        ({"lm": "../../etc"}, "not offered"),
        ({"diffusion": None}, "diffusion"),
        ({"out": "/tmp/elsewhere"}, "not a value of the page"),
    ],
)
def test_values_that_the_page_does_not_offer_are_refused(base, changed, message):
    with pytest.raises(ConfigError, match=message):
        build_request(base, values_of(base, **changed))


def test_videos_of_other_length_or_settings_have_names_of_their_own(base):
    paths = set()
    for changed in ({}, {"num_latent_frames": 5}, {"motion_score": 0.5}, {"guidance": 1.0}):
        paths.add(build_request(base, values_of(base, **changed)).path)
    assert len(paths) == 4


def test_the_queue_is_bounded_and_jobs_that_wait_can_be_cancelled(base):
    queue = JobQueue()
    request = build_request(base, values_of(base))
    jobs = [queue.add(request) for _ in range(MAX_WAITING)]
    with pytest.raises(ConfigError, match="waiting already"):
        queue.add(request)
    queue.cancel(jobs[0].id)
    queue.cancel("unknown")
    assert jobs[0].state == "cancelled" and queue.take() is jobs[1]
    assert queue.jobs_before(jobs[3]) == 2
    queue.close()
    assert queue.take() is None and jobs[1].is_cancelled


def test_the_page_is_for_this_machine_only_unless_told_otherwise(base, capsys):
    words = ["demo", "--config", "nano/sample", f"zoo={base.zoo}", "--dry-run"]
    assert main(words) == 0 and "a page on 127.0.0.1:7860" in capsys.readouterr().out
    assert main([*words, "--host", "0.0.0.0", "--port", "80"]) == 0
    assert "a page on 0.0.0.0:80" in capsys.readouterr().out
    assert is_local("127.0.0.1") and is_local("localhost") and is_local("::1")
    assert not is_local("0.0.0.0") and not is_local("example.com")
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1])
