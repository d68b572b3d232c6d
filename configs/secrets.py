"""Finds secrets by the name of their variable and by their form, and redacts them in text.

Used for all text that leaves the process: files that describe a run, `--dry-run`, logs and error
messages. Files with real environment values have the permissions `landiff.configs.files.PRIVATE`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

REDACTED = "<redacted>"

# Parts of upper-cased variable names.
SECRET_NAME = re.compile(
    "TOKEN|KEY|SECRET|PASS|PWD|CREDENTIAL|JWT|AUTH|COOKIE|PRIVATE|SIGNATURE|BEARER|DSN|SESSION"
    "|CONNECTION_STRING|SAS_|_SAS|NETRC|WEBHOOK"
)
# PWD and OLDPWD are folders, and the name KEY is too general.
HARMLESS_NAMES = frozenset(
    {"KEY", "PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "NCCL_IB_PKEY"}
)
ASSIGNMENT = re.compile(r"\b([A-Z][A-Z0-9_]+)=('[^']*'|\"[^\"]*\"|[^\s'\";]+)")

_PARAMETER = (
    r"(?:access[-_]?|auth[-_]?|api[-_]?|secret[-_]?|client[-_]?|private[-_]?|refresh[-_]?"
    r"|hf[-_]?|sas[-_]?)*"
    r"(?:token|secret|password|passwd|passphrase|credentials?|api[-_]?key|access[-_]?key(?:[-_]?id)?"
    r"|secret[-_]?key|private[-_]?key|pwd|signature|jwt)"
)
# (pattern, replacement), applied in this order
VALUES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*-----|\Z)", re.DOTALL
        ),
        REDACTED,
    ),
    # user:password@ and token@ in a URL; a password may contain an @
    (re.compile(r"(?<=://)[^\s/?#'\"]+@(?=[^\s@/?#'\"]+)"), f"{REDACTED}@"),
    (
        re.compile(r"(?i)([?&](?:[\w.-]*[-_.])?(?:sig|" + _PARAMETER + r")=)[^&\s'\"#]+"),
        rf"\1{REDACTED}",
    ),
    (
        re.compile(
            r"(?i)(\bauthorization['\"]?\s*[:=]\s*['\"]?)"
            r"(?:(?:bearer|basic|token|digest)\s+)?[^\s'\",]+"
        ),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{16,}"), rf"\1 {REDACTED}"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]*"), REDACTED),
    (re.compile(r"\b(?:hf|api_org|gh[pousr]|npm)_[A-Za-z0-9]{16,}"), REDACTED),
    (re.compile(r"\b(?:github_pat_|glpat-|pypi-|dckr_pat_)[A-Za-z0-9_-]{16,}"), REDACTED),
    (re.compile(r"\bsk[-_](?:[a-z]+[-_])*[A-Za-z0-9_-]{16,}"), REDACTED),
    (re.compile(r"\b(?:AKIA|ASIA|AGPA|AIDA|AROA)[A-Z0-9]{12,}"), REDACTED),
    (re.compile(r"\bAIza[A-Za-z0-9_-]{30,}"), REDACTED),
    (re.compile(r"\bxox[abeprs]-[A-Za-z0-9-]{10,}"), REDACTED),
    # NAME=value, --name value and "name: value", where the name is that of a secret
    (
        re.compile(
            r"(?i)((?:\b|_|--)" + _PARAMETER + r"['\"]?\s*[=:]\s*)('[^']*'|\"[^\"]*\"|[^\s'\",;&]+)"
        ),
        rf"\1{REDACTED}",
    ),
    (
        re.compile(r"(?i)(--(?:[\w-]+-)?" + _PARAMETER + r"\s+)('[^']*'|\"[^\"]*\"|[^\s'\"-]\S*)"),
        rf"\1{REDACTED}",
    ),
)


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret, e.g. HF_TOKEN, HF_AUTH or DB_PASSWD."""
    upper = name.upper()
    return upper not in HARMLESS_NAMES and SECRET_NAME.search(upper) is not None


def redact(text: str) -> str:
    """`text` with everything that has the form of a secret replaced by `REDACTED`."""
    for pattern, replacement in VALUES:
        text = pattern.sub(replacement, text)
    return ASSIGNMENT.sub(_redact_assignment, text)


def _redact_assignment(match: re.Match[str]) -> str:
    """A matched NAME=value, without the value if the name is that of a secret."""
    if is_secret_name(match[1]):
        return f"{match[1]}={REDACTED}"
    return match[0]


def redact_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for display, without the values or parts of values that are secret."""
    shown = {}
    for name, value in variables.items():
        shown[name] = REDACTED if is_secret_name(name) and value else redact(value)
    return shown


class RedactingFormatter(logging.Formatter):
    """Log formatter that redacts secrets, also in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted record, redacted."""
        return redact(super().format(record))
