"""What a fingerprint covers, and what is said about missing packages."""

import pytest
import torch

from landiff.configs import ConfigError
from landiff.model_zoo.frozen.weights import encoder_fingerprint, package_folder

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
MARK = encoder_fingerprint("kind", {"length": 3}, TENSORS)


def test_fingerprint_is_the_same_everywhere():
    assert MARK == "7da68eee4bd839e1"
    assert (
        encoder_fingerprint(
            "kind", {"length": 3}, {"b": TENSORS["b"], "a": TENSORS["a"].T.contiguous().T}
        )
        == MARK
    )


@pytest.mark.parametrize(
    ("kind", "options", "tensors"),
    [
        ("other", {"length": 3}, TENSORS),
        ("kind", {"length": 4}, TENSORS),
        ("kind", {"length": 3}, TENSORS | {"a": TENSORS["a"] + torch.eye(2, 3) * 1e-6}),
        ("kind", {"length": 3}, TENSORS | {"a": TENSORS["a"].reshape(3, 2)}),
        ("kind", {"length": 3}, TENSORS | {"b": TENSORS["b"].float()}),
        ("kind", {"length": 3}, {"a": TENSORS["a"], "c": TENSORS["b"]}),
        ("kind", {"length": 3}, {"a": TENSORS["a"]}),
    ],
)
def test_fingerprint_changes_with(kind, options, tensors):
    assert encoder_fingerprint(kind, options, tensors) != MARK


def test_a_missing_package_comes_with_its_pip_command():
    with pytest.raises(ConfigError, match=r"no_such_package.*pip install no-such-package==1\.0"):
        package_folder("no_such_package", "no-such-package==1.0")
