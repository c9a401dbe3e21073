"""One name for each kind of storage, and no secret in any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen import filesystems, urls
from batchgen.errors import InputError
from batchgen.store import connect

SECRET = [
    "https://host/x.parquet?X-Amz-Signature=1234",
    "HTTPS://host/x.parquet?sig=1234",
    "https://me@host/x.parquet",
    "s3://me:12/34@host/x.parquet",
    "ftp://me:1234@host/x.parquet",
    "az://container/x.parquet?sv=2020&sig=1234",
    "simplecache::https://me:1234@host/x.parquet",
]
OPEN = [
    "/x/a?b.parquet",
    "gs://b/dt=2026-??-01/*.parquet",
    "gs://b/year=202?month=1/x.parquet",
    "hf://datasets/acme/prompts@main/x.parquet",
    "abfss://container@account.dfs.core.windows.net/x.parquet",
    "https://host/x.parquet",
]


@pytest.mark.parametrize("url", SECRET)
def test_a_url_with_a_secret_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(InputError, match="would stand in logs") as caught:
        connect(url)
    assert "1234" not in str(caught.value)


@pytest.mark.parametrize("url", OPEN)
def test_other_urls_are_not(url: str) -> None:
    assert not urls.holds_secret(url)


@given(
    st.sampled_from(["https", "gs", "ftp", "HTTPS"]),
    st.from_regex(r"\A[a-z]{1,8}\Z"),
    st.from_regex(r"\A[A-Za-z0-9%_-]{12,20}\Z"),
)
def test_a_message_keeps_its_url_and_loses_the_secret(scheme: str, host: str, secret: str) -> None:
    queries = (f"Signature={secret}&Expires=1", f"name=UTF-8''a.parquet&Signature={secret}")
    said = filesystems.cause(OSError(f"Max retries exceeded with url: /x?{queries[0]}, try later"))
    assert secret not in said
    for url in (f"{scheme}://user:{secret}@{host}/x", *(f"{scheme}://{host}/x?{query}" for query in queries)):
        said = filesystems.cause(OSError(f"503 for url '{url}', try later"))
        assert secret not in said
        assert f"{scheme}://{host}/x" in said
        assert said.endswith(", try later")


def test_storage_has_one_name() -> None:
    names = {"file:///x": "", "/x": "", "local:///x": "", "gcs://b": "gs", "s3a://b": "s3", "abfss://b": "az"}
    assert {url: urls.scheme(url) for url in names} == names
