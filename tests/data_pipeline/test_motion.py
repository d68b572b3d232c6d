import cv2
import numpy as np
import pytest

from landiff.data_pipeline.video.motion import motion


@pytest.fixture(scope="module")
def texture() -> np.ndarray:
    """Smooth random picture, uint8 [256, 640, 3]."""
    noise = np.random.default_rng(0).normal(size=(256, 640, 3))
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX).astype(
        np.uint8
    )


def pan(picture: np.ndarray, step: int, size: int, frames: int = 9) -> np.ndarray:
    return np.stack([picture[:size, step * k : step * k + size] for k in range(frames)])


@pytest.mark.parametrize(("size", "step"), [(128, 2), (128, 6), (256, 4)])
def test_pan_of_known_speed_has_that_score(texture: np.ndarray, size: int, step: int) -> None:
    found = motion(pan(texture, step, size), fps=8)
    speed = step / size * 8
    assert found.mean == pytest.approx(
        speed, rel=0.05
    )  # DIS at this preset is within 2 % on smooth texture
    assert found.camera[0] == pytest.approx(-speed, rel=0.05)
    assert abs(found.camera[1]) < 0.05 * speed
    assert found.residual < 0.15 * speed
    assert found.cuts == 0


def test_speed_does_not_depend_on_the_frame_rate(texture: np.ndarray) -> None:
    at_8 = motion(pan(texture, 6, 128, 9), fps=8)
    at_24 = motion(pan(texture, 2, 128, 25), fps=24)
    assert at_24 == at_8  # every third frame is the same picture


def test_still_scores_zero(texture: np.ndarray) -> None:
    found = motion(pan(texture, 0, 128), fps=8)
    assert (found.mean, found.p95, found.residual, found.cuts) == (0.0, 0.0, 0.0, 0)


def test_pair_across_a_cut_is_left_out(texture: np.ndarray) -> None:
    other = 255 - texture[::-1] // 2
    joined = np.concatenate([pan(texture, 2, 128, 5), pan(other[:, 300:], 2, 128, 5)])
    found = motion(joined, fps=8)
    assert found.cuts == 1
    assert found.mean == pytest.approx(2 / 128 * 8, rel=0.1)


def test_object_motion_is_residual_and_not_camera(texture: np.ndarray) -> None:
    frames = pan(texture, 0, 128)
    for k, frame in enumerate(frames):
        frame[40:90, 10 + 4 * k : 60 + 4 * k] = texture[130:180, 400:450]
    found = motion(frames, fps=8)
    assert found.residual == pytest.approx(found.mean, rel=0.05)
    assert np.abs(found.camera).max() < 0.15 * found.mean
    covered = 50 * 50 / 128**2
    assert found.mean == pytest.approx(
        4 / 128 * 8 * covered, rel=0.35
    )  # flow bleeds over the object's rim


def test_one_frame_has_no_motion(texture: np.ndarray) -> None:
    assert motion(texture[None, :128, :128], fps=8).mean == 0.0


def test_score_does_not_depend_on_the_number_of_threads(texture: np.ndarray) -> None:
    frames = pan(texture, 3, 128)
    before = motion(frames, fps=8)
    cv2.setNumThreads(4)
    assert motion(frames, fps=8) == before
