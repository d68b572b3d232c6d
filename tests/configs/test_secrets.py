"""Secrets are recognised by name and by form, and other text is not."""

from __future__ import annotations

import logging
import os
import stat

import pytest
from pydantic import Field

from landiff.configs import Config, ConfigError, load
from landiff.configs.files import PRIVATE, atomic_file, write_text
from landiff.configs.loader import write_config
from landiff.configs.secrets import (
    REDACTED,
    RedactingFormatter,
    is_secret_name,
    redact,
    redact_variables,
)

TOKEN = "hf_" + "aB3dE5fG7hJ9" * 3


@pytest.mark.parametrize("name", [
    "HF_TOKEN", "HF_AUTH", "DB_PASSWD", "PASSWORD", "MYSQL_PWD", "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID", "wandb_api_key", "GITHUB_PAT_TOKEN", "SLURM_JWT", "SSH_PRIVATE", "COOKIE",
    "AZURE_SAS_URL", "SENTRY_DSN", "GOOGLE_APPLICATION_CREDENTIALS",
])  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name) and redact_variables({name: "x"}) == {name: REDACTED}


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "PWD",
        "NCCL_DEBUG",
        "CUDA_VISIBLE_DEVICES",
        "HF_HOME",
        "TOKENIZERS_PARALLELISM",
        "NCCL_IB_PKEY",
    ],
)
def test_names_that_are_none(name):
    assert redact_variables({name: "x"}) == {name: "x"}


@pytest.mark.parametrize(("text", "secret"), [
    ("HF_ENDPOINT=https://user:pass%40word@hub.example/x", "pass%40word"),
    ("https://user:p@ss@host/x", "p@ss"),
    ("git clone https://tok3n@host/x", "tok3n"),
    ("https://h/x?a=1&token=abc123&b=2", "abc123"),
    ("https://s3/x?X-Amz-Credential=AK1&X-Amz-Signature=ff00", "ff00"),
    ("https://blob/x?sv=1&sig=aa%3D", "aa%3D"),
    (f"login with {TOKEN} failed", TOKEN),
    ("ghp_" + "a1B2" * 9, "a1B2"),
    ("github_pat_" + "a1B2_" * 9, "a1B2"),
    ("sk-proj-" + "a1B2" * 9, "a1B2"),
    ("AKIAABCDEFGHIJKLMNOP", "ABCDEFGHIJ"),
    ("xoxb-1234567890-abcdef", "1234567890"),
    ("eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl", "c2lnbmF0dXJl"),
    ("Authorization: Bearer abc.def", "abc.def"),
    ("{'Authorization': 'Basic dXNlcjpwYXNz'}", "dXNlcjpwYXNz"),
    ("curl -H 'authorization: token abcdef'", "abcdef"),
    ("HF_AUTH=abc DB_PASSWD='a b' landiff train", "a b"),
    ("landiff train --token abc --api-key=def", "def"),
    ("password: hunter2", "hunter2"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabcd\n-----END RSA PRIVATE KEY-----", "MIIE"),
])  # fmt: skip
def test_secrets_in_text_are_redacted_by_value(text, secret):
    assert secret in text and secret not in redact(text) and REDACTED in redact(text)


@pytest.mark.parametrize("text", [
    "num_tokens=512 tokens=5 text.max_tokens = 4", "tokenizer: zoo/tokenizer@3f2a9c",
    "s3://bucket/key@v1", "http://host:8080/path?x=1", "git@github.com:owner/name.git",
    "lm@0123456789abcdef", "key = 5", "token_layout.py, line 3", "step 3  loss 1.5  99 tokens/s",
    "a/risk-of-a-very-long-file-name", "PYTHONPATH=/a:/b",
])  # fmt: skip
def test_other_text_stays(text):
    assert redact(text) == text


def test_log_lines_and_tracebacks_hold_no_secret():
    try:
        raise ValueError(f"bad {TOKEN}")
    except ValueError as error:
        record = logging.LogRecord(
            "x",
            logging.INFO,
            "x",
            1,
            "url %s",
            ("https://u:p@h",),
            (ValueError, error, error.__traceback__),
        )
    line = RedactingFormatter("%(message)s").format(record)
    assert TOKEN not in line and "u:p@" not in line and "ValueError" in line


class Site(Config):
    env: dict[str, str] = Field(default={})
    url: str = ""
    count: int = 0


@pytest.mark.parametrize(
    ("data", "secret"),
    [
        ({"env": {"HF_TOKEN": ["hunter2"]}}, "hunter2"),
        ({"env": {"PROXY": ["https://u:hunter2@h"]}}, "hunter2"),
        ({"count": TOKEN}, TOKEN),
    ],
)
def test_an_error_shows_no_secret(data, secret):
    with pytest.raises(ConfigError) as error:
        load(Site, data)
    assert secret not in str(error.value)


def test_a_syntax_error_shows_no_line_of_the_file(tmp_path):
    (tmp_path / "x.yaml").write_text(f'env: {{HF_TOKEN: "{TOKEN}\n')
    with pytest.raises(ConfigError) as error:
        load(Site, tmp_path / "x.yaml")
    assert TOKEN not in str(error.value)


def permissions(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_files_are_private_from_their_creation_on(tmp_path):
    path = tmp_path / "secret"
    write_text(path, "old")
    with atomic_file(path, "w", PRIVATE) as file:
        file.write("new")
        file.flush()
        temporary = [other for other in tmp_path.iterdir() if other != path]
        assert [permissions(other) for other in temporary] == [PRIVATE]
    assert permissions(path) == PRIVATE and path.read_text() == "new"
    write_text(path, "public")
    assert permissions(path) == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_config_with_a_password_is_private_and_whole(tmp_path):
    config = Site(url="https://u:p@h/x")
    write_config(tmp_path / "a.yaml", config)
    write_config(tmp_path / "b.yaml", Site())
    assert permissions(tmp_path / "a.yaml") == PRIVATE and load(Site, tmp_path / "a.yaml") == config
    assert permissions(tmp_path / "b.yaml") == 0o666 & ~current_umask()
