"""How a place in storage is named: in one way, and never with a secret."""

from __future__ import annotations

import re

# Storage with an atomic create; "memory" is for tests.
WRITABLE = {"", "memory", "gs", "s3", "az"}
# By another name a file would be another shard, and its rows be done once more.
_SAME = {"file": "", "local": "", "gcs": "gs", "s3a": "s3", "abfs": "az", "abfss": "az"}
_KEYS = (
    r"(?:sig|signature|token|access_token|credential|password|secret|key|x-amz-[\w-]+|x-goog-[\w-]+|awsaccesskeyid)="
)
# user:password@ before the host, on the web any user and any query; elsewhere the words of signed URLs.
_SECRET = re.compile(rf"://[^/@]*:[^@\s]*@|https?://[^/]*@|https?://.*\?|://.*[?&]{_KEYS}", re.IGNORECASE)
# A quote ends a query unless more of it follows, as in `filename*=UTF-8''x&Signature=...`.
_URL = re.compile(
    r"(\b[a-z][a-z0-9+.-]*://)(?:[^\s/'\"]*@)?([^\s?\"<>]*?)(\?(?:[^\s'\"<>]|'(?=[^\s]*=))*)?(?=[\s'\"<>]|$)",
    re.IGNORECASE,
)
_PAIR = re.compile(rf"\b({_KEYS})[^\s&'\"]+", re.IGNORECASE)


def scheme(url: str) -> str:
    """What stands before "://", one word for each kind of storage; empty for a local path."""
    head, mark, _ = url.partition("://")
    return _SAME.get(head, head) if mark else ""


def holds_secret(url: str) -> bool:
    """Whether a URL carries a password or a signature."""
    return bool(_SECRET.search(url))


def without_secrets(text: str) -> str:
    """A text with users, passwords and queries left out of the URLs in it, for logs."""
    text = _URL.sub(lambda found: f"{found[1]}{found[2]}{'?...' if found[3] else ''}", text)
    return _PAIR.sub(r"\1...", text)
