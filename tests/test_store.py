"""Storage: whole objects or none, one creator, every name, and listings that others' writes show up in at once."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import http.server
import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faultproxy import serving

from batchgen import filesystems
from batchgen.errors import InputError, StoreError
from batchgen.store import Entry, Store, connect

if TYPE_CHECKING:
    from pathlib import Path

Anywhere = tuple[str, dict[str, Any]]


def test_importing_the_store_loads_no_storage_library() -> None:
    code = (
        "import sys, batchgen.store; print({'gcsfs', 's3fs', 'aiohttp', 'google.auth', 'pyarrow'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def test_what_is_put_is_read(anywhere: Anywhere) -> None:
    store, url = connect(*anywhere), f"{anywhere[0]}/a/b.bin"
    store.put(url, b"first")
    store.put(url, b"second")
    assert store.read(url) == b"second"
    store.put(url, b"")
    assert store.read(url) == b""


@pytest.mark.parametrize(
    "name",
    [
        "dt=2026-11-22/part-0.parquet",  # hive partitions
        "sp ace/ü ✓.txt",  # URL quoting
        "a#1?b=c&d%2F+e",  # what URLs use themselves
        "run[1]/*.x{2}",  # patterns that are names
        "__batchgen/names/0",
    ],
)
def test_any_name_comes_back_as_it_was_given(anywhere: Anywhere, name: str) -> None:
    store, url = connect(*anywhere), f"{anywhere[0]}/{name}"
    assert store.create(url, b"x")
    assert store.read(url) == b"x"
    assert list(store.find(anywhere[0])) == [url]
    assert store.find(url.rsplit("/", 1)[0], recursive=False)[url] == store.info(url)
    store.delete([url])
    assert store.find(anywhere[0]) == {}


def test_bytes_that_look_like_an_upload_boundary_are_stored_whole(gcs_folder: Anywhere) -> None:
    # gcsfs' own upload stores only the first line of this.
    data = b"first\n--==0==\nContent-Type: text/plain\n\nsecond\n--==0==--\nthird"
    store = connect(*gcs_folder)
    store.put(f"{gcs_folder[0]}/x", data)
    assert store.read(f"{gcs_folder[0]}/x") == data


def test_create_never_replaces(anywhere: Anywhere) -> None:
    store, url = connect(*anywhere), f"{anywhere[0]}/x"
    assert store.create(url, b"mine")
    assert not store.create(url, b"yours")
    assert store.create(url, b"mine"), "the object holds these very bytes"
    assert store.read(url) == b"mine"


def test_swap_replaces_what_it_knows_and_nothing_else(anywhere: Anywhere) -> None:
    store, url = connect(*anywhere), f"{anywhere[0]}/x"
    assert not store.swap(url, b"", b"1"), "there is nothing to replace"
    store.put(url, b"1")
    assert store.swap(url, b"1", b"2")
    assert not store.swap(url, b"1", b"3")
    assert store.read(url) == b"2"
    assert list(store.find(anywhere[0])) == [url]


def test_of_many_swaps_one_wins(anywhere: Anywhere) -> None:
    url = f"{anywhere[0]}/x"
    connect(*anywhere).put(url, b"0")
    barrier = threading.Barrier(8)

    def swap(i: int) -> list[int]:
        store, won = connect(*anywhere), []
        for turn in range(5):
            barrier.wait()
            won += [turn] if store.swap(url, b"%d" % turn, b"%d" % (turn + 1) + b" by %d" % i) else []
            barrier.wait()
            if won and won[-1] == turn:
                store.put(url, b"%d" % (turn + 1))
            barrier.wait()
        return won

    with ThreadPoolExecutor(8) as threads:
        assert sorted(turn for won in threads.map(swap, range(8)) for turn in won) == [0, 1, 2, 3, 4]


def test_a_swap_does_not_wait_without_end_for_one_that_stopped_midway(tmp_path: Path) -> None:
    store, url = connect(str(tmp_path)), f"{tmp_path}/x"
    store.put(url, b"1")
    store.budget_s = 1.5
    with (tmp_path / ".tmp-x.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"swap .*/x: OSError: .*locked by another process.*gave up after"):
            store.swap(url, b"1", b"2")
    assert store.swap(url, b"1", b"2")


def test_what_killed_writers_left_is_found(tmp_path: Path) -> None:
    old = tmp_path / "a" / ".tmp-1"
    old.parent.mkdir()
    for file in (old, tmp_path / ".tmp-2", tmp_path / ".tmp-x.lock", tmp_path / "x"):
        file.write_bytes(b"")
    for file in (old, tmp_path / ".tmp-x.lock", tmp_path / "x"):
        os.utime(file, (0, 0))
    for prefix in ("", "file://"):
        store = connect(f"{prefix}{tmp_path}")
        assert store.unfinished(f"{prefix}{tmp_path}") == [str(old)]
    store.delete(store.unfinished(f"file://{tmp_path}"))
    assert not old.exists()


@pytest.mark.parametrize("size", [10, 300_000])
def test_exactly_one_of_many_creators_wins(anywhere: Anywhere, size: int) -> None:
    store = connect(*anywhere)
    with ThreadPoolExecutor(12) as threads:
        for turn in range(5):
            url, start = f"{anywhere[0]}/{size}/{turn}", threading.Barrier(12)
            bodies = [bytes([i]) * size for i in range(12)]

            def create(body: bytes, url: str = url, start: threading.Barrier = start) -> bool:
                start.wait()
                return store.create(url, body)

            won = list(threads.map(create, bodies))
            assert won.count(True) == 1
            assert store.read(url) == bodies[won.index(True)]


def test_memory_is_a_store_too() -> None:
    store = connect("memory://batchgen-test")
    store.remove("memory://batchgen-test")
    assert store.create("memory://batchgen-test/x", b"1")
    assert not store.create("memory://batchgen-test/x", b"2")
    assert list(store.find("memory://batchgen-test")) == ["memory://batchgen-test/x"]
    assert list(store.glob("memory://batchgen-test/*")) == ["memory://batchgen-test/x"]
    store.remove("memory://batchgen-test")


def test_a_folder_is_listed_whole_or_flat(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    for name in ("b", "a", "sub/c", "sub/deep/d"):
        store.put(f"{folder}/{name}", name.encode())
    store.put(f"{folder}-beside/e", b"")
    assert list(store.find(folder)) == [f"{folder}/{name}" for name in ("a", "b", "sub/c", "sub/deep/d")]
    assert list(store.find(folder, recursive=False)) == [f"{folder}/a", f"{folder}/b"]
    assert list(store.glob(f"{folder}/*")) == [f"{folder}/a", f"{folder}/b"]
    assert list(store.glob(f"{folder}/**/d")) == [f"{folder}/sub/deep/d"]
    assert list(store.glob(f"{folder}/a")) == [f"{folder}/a"]
    assert store.find(f"{folder}/sub/c") == {}, "an object is not a folder"


def test_what_is_not_there_is_empty_or_not_found(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    store.put(f"{folder}/sub/x", b"1")
    assert store.find(f"{folder}/none") == store.glob(f"{folder}/none/*") == store.glob(f"{folder}/none") == {}
    store.delete([f"{folder}/none", f"{folder}/sub/none"])
    store.remove(f"{folder}/none")
    for act in (store.read, store.info, lambda url: store.open(url).__enter__()):
        with pytest.raises(FileNotFoundError, match=f"{folder}/none"):
            act(f"{folder}/none")
    with pytest.raises(FileNotFoundError, match=f"{folder}/sub"):
        store.info(f"{folder}/sub")


def test_writes_of_others_are_seen_at_once(anywhere: Anywhere) -> None:
    one, other, folder = connect(*anywhere), connect(*anywhere), anywhere[0]
    assert one.find(folder) == {}
    other.put(f"{folder}/x", b"1")
    assert list(one.find(folder)) == [f"{folder}/x"]
    other.delete([f"{folder}/x"])
    assert one.find(folder) == {}


def test_a_version_changes_with_the_content(anywhere: Anywhere) -> None:
    store, url = connect(*anywhere), f"{anywhere[0]}/x"
    versions = set()
    for content in (b"1", b"2", b"22"):
        store.put(url, content)
        entry = store.info(url)
        assert entry == store.find(anywhere[0])[url] == store.glob(f"{anywhere[0]}/?")[url]
        assert (entry.url, entry.size_bytes) == (url, len(content))
        versions.add(entry.version)
    assert len(versions) == 3


def test_remove_takes_everything_below_and_nothing_beside(anywhere: Anywhere) -> None:
    store, folder = connect(*anywhere), anywhere[0]
    for name in ("a/1", "a/b/2", "ab"):
        store.put(f"{folder}/{name}", b"")
    store.remove(f"{folder}/a")
    assert list(store.find(folder)) == [f"{folder}/ab"]


def test_a_file_is_read_in_ranges(anywhere: Anywhere) -> None:
    store, url = connect(*anywhere), f"{anywhere[0]}/x.parquet"
    table = pa.table({"x": range(10_000)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=1000, write_page_checksum=True)
    store.put(url, sink.getvalue().to_pybytes())
    with store.open(url, version=store.info(url).version) as file:
        parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
        assert parquet.read_row_group(7)["x"].to_pylist() == list(range(7000, 8000))
        assert parquet.read().equals(table)
        size = store.info(url).size_bytes
        assert file.seek(-4, os.SEEK_END) == size - 4
        assert file.read() == b"PAR1"
        assert (file.read(1), file.tell(), file.readable(), file.seekable()) == (b"", size, True, True)
    with store.open(url) as file, io.BufferedReader(cast("io.RawIOBase", file)) as buffered:
        assert buffered.peek(4)[:4] == b"PAR1"


def test_an_input_that_changed_since_it_was_planned_is_refused(anywhere: Anywhere) -> None:
    store, url = connect(*anywhere), f"{anywhere[0]}/x"
    store.put(url, b"old")
    version = store.info(url).version
    store.put(url, b"new!")
    with pytest.raises(InputError, match=f"{url}: changed since it was planned"), store.open(url, version=version):
        pass


def test_an_input_that_changes_while_it_is_read_is_refused_at_the_latest_when_it_was_read(anywhere: Anywhere) -> None:
    store, url = connect(*anywhere), f"{anywhere[0]}/x"
    store.put(url, b"old" * 10)
    version = store.info(url).version

    def read() -> None:
        with store.open(url, version=version) as file:
            assert file.read(3) == b"old"
            store.put(url, b"new!" * 10)
            file.read(3)

    with pytest.raises((InputError, StoreError), match=f"{url}: (changed since it was planned|replaced or removed)"):
        read()
    with store.open(url):
        store.put(url, b"newer" * 10)


def test_an_object_replaced_while_it_is_read_is_an_error_and_not_a_mixture(gcs_folder: Anywhere) -> None:
    store, url = connect(*gcs_folder), f"{gcs_folder[0]}/x"
    store.put(url, b"old" * 10)
    with store.open(url) as file:
        assert file.read(3) == b"old"
        store.put(url, b"new" * 10)
        with pytest.raises(StoreError, match=f"{url}: replaced or removed while it was read"):
            file.read(3)


def test_the_tails_of_many_objects_come_in_order(anywhere: Anywhere) -> None:
    store = connect(*anywhere)
    for i in range(40):
        store.put(f"{anywhere[0]}/{i:02d}", b"x" * i + f"{i:02d}".encode())
    entries = list(store.find(anywhere[0]).values())[::-1]
    assert store.tails(entries, 2) == [f"{i:02d}".encode() for i in reversed(range(40))]
    assert store.tails(entries[-1:], 100) == [b"00"]
    assert store.tails([], 100) == []
    gone = dataclasses.replace(entries[3], url=f"{anywhere[0]}/gone")
    with pytest.raises(FileNotFoundError, match=f"{anywhere[0]}/gone"):
        store.tails([*entries[:3], gone], 2)


def test_links_and_relative_paths_work_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blob").write_bytes(b"123")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "blob")  # how the Hugging Face cache stores files
    (tmp_path / "in" / "loop").symlink_to(tmp_path)
    (tmp_path / "in" / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    store = connect("in")
    found = f"{tmp_path}/in/link"
    assert store.glob("in/*") == store.find("in") == {found: Entry(found, 3, store.info("blob").version)}
    store = connect(f"file://{tmp_path}")
    assert list(store.find(f"file://{tmp_path}/in")) == [found]


def test_folders_that_are_linked_to_are_read_and_circles_end(tmp_path: Path) -> None:
    for name in ("in/dt=1/a", "disk2/b", "disk2/sub/c", "disk3/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"123")
    (tmp_path / "in" / "dt=2").symlink_to(tmp_path / "disk2")
    (tmp_path / "disk2" / "more").symlink_to(tmp_path / "disk3")
    (tmp_path / "disk3" / "back").symlink_to(tmp_path / "disk2")
    (tmp_path / "disk3" / "up").symlink_to(tmp_path)
    store = connect(str(tmp_path))
    every = {f"{tmp_path}/in/{name}" for name in ("dt=1/a", "dt=2/b", "dt=2/sub/c", "dt=2/more/d")}
    assert set(store.find(f"{tmp_path}/in")) == set(store.glob(f"{tmp_path}/in/**/*")) == every
    assert set(store.glob(f"{tmp_path}/in/*/*")) == {url for url in every if url[-1] in "ab"}


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_empty(tmp_path: Path) -> None:
    class Broken(filesystems.Disk):
        def ls(self, path: str, detail: bool = False, **kwargs: Any) -> list[Any]:
            if path.endswith("/sub"):
                raise PermissionError(13, "Permission denied", path)
            return super().ls(path, detail=detail, **kwargs)

    (tmp_path / "sub").mkdir()
    store = Store("", Broken(), (OSError,), ("", None))
    for act in (store.find, lambda folder: store.glob(f"{folder}/**/*.parquet")):
        with pytest.raises(StoreError, match=r"PermissionError: .*/sub"):
            act(str(tmp_path))


def test_files_on_disk_have_the_permissions_of_the_users_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    connect(str(tmp_path)).create(f"{tmp_path}/x", b"")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_web_server_is_read_from_even_if_it_knows_no_ranges(tmp_path: Path) -> None:
    table = pa.table({"x": range(5000)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1000)
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as at:
        url = f"{at}/x.parquet"
        store = connect(url)
        entry = store.info(url)
        assert store.glob(url) == {url: entry}
        with store.open(url, version=entry.version) as file:
            assert pq.ParquetFile(file).read().equals(table)
        os.utime(tmp_path / "x.parquet", (0, 0))
        with pytest.raises(InputError, match="changed since it was planned"), store.open(url, version=entry.version):
            pass


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_mistakes_are_named(gcs: str, tmp_path: Path) -> None:
    store = connect("gs://", {"endpoint_url": gcs})
    with pytest.raises(StoreError, match=r"^create gs://no-such-bucket/x: nowhere to write; does the bucket exist\?$"):
        store.create("gs://no-such-bucket/x", b"")
    assert store.find("gs://no-such-bucket/x") == {}
    with pytest.raises(InputError, match=r"^x://b: cannot connect: ValueError: Protocol not known: x$"):
        connect("x://b")
    with pytest.raises(StoreError, match=r"^put http://b/x: http:// has no atomic create; write to gs://"):
        Store("http", filesystems.Memory(), (OSError,), ("http://b", None)).put("http://b/x", b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=rf"^put {tmp_path}/file/x: NotADirectoryError"):
        connect(str(tmp_path)).put(f"{tmp_path}/file/x", b"")


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(InputError, match=r"^abfs://b/x: cannot connect: ImportError: .*; pip install adlfs$"):
        connect("abfs://b/x")


def test_an_emulator_needs_no_credentials_and_options_are_never_shown(
    gcs: str, gcs_folder: Anywhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs)
    store = connect(gcs_folder[0], {"session_kwargs": {"headers": {"x-secret": "sesame"}}})
    store.put(f"{gcs_folder[0]}/x", b"1")
    assert "sesame" not in repr(store)
    assert filesystems.gcs_settings({"endpoint_url": gcs})["token"] == "anon"
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    assert "token" not in filesystems.gcs_settings({}), "the real service is asked with the user's credentials"
