"""Hidden states of a job's finished rows, for training draft heads: a second, prefill-only pass over its parts.

A file holds some rows of one part, and is stored by one create-only request: what stands is done, so the same command
resumes after a crash, and does what is new after the next submit. Files are named by the part's shard and its commit,
so that a part that was replaced is read again; what was captured of the one before it is removed.

A file is safetensors, rows one after the other, S tokens in all of N rows:

    hidden_states [S, L, H]   the residual stream after each of L decoder layers, of 0 the embedding, before any norm
    token_ids [S] int64       prompt and completion, of a conversation all of its turns
    loss_mask [S] uint8       1 where the target itself wrote the token
    lengths [N] int64         tokens of each row

and its metadata names `layers`, and `row_ids` and `samples` of the rows, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen import engines, models, record, write
from batchgen.errors import DrainedError, InputError, OutputConflictError
from batchgen.store import STATE_FOLDER, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from batchgen.generate import Capture
    from batchgen.spec import Spec
    from batchgen.store import Store

log = logging.getLogger("batchgen.features")

FILE_BYTES = 256 << 20
_COLUMNS = ["row_id", "sample", "status", "prompt_token_ids", "completion_token_ids"]
# Of rows that are conversations.
_IF_THERE = ["answers.list.element.start", "answers.list.element.stop"]
_MANIFEST = "features.json"
# Rows that a capture gets at a time: what is not yet stored is lost in a crash, and kept in memory until then.
_ROWS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """Rows of one part, by their place among its finished ones: what one file of hidden states holds."""

    name: str
    part: str
    start: int
    stop: int
    num_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What a capture is to do; `num_bytes` is the size of `todo`."""

    folder: str
    layers: tuple[int, ...]
    dtype: str
    files: list[File]
    todo: list[File]
    num_bytes: int


def run(
    spec: Spec,
    *,
    to: str | None = None,
    layers: Sequence[int] | None = None,
    dtype: str = "bfloat16",
    draining: Callable[[], bool] = lambda: False,
    started: Callable[[Work], None] = lambda work: None,
    stored: Callable[[File], None] = lambda file: None,
) -> Work:
    """Capture what is not captured yet, into the folder `to` or one beside the job's parts; returns what was to do.

    `layers` are counts of decoder layers, by default those that the job's head listens to, or EAGLE-3 heads do, and the
    last one. `started` is called before any model is loaded, `stored` after each file.

    Raises:
        InputError: the job has no parts, or they hold no token ids.
        OutputConflictError: all parts are of other targets, or the folder holds other layers or another dtype.
        DrainedError: `draining` became true.
    """
    sink = connect(spec.output.path, spec.output.storage_options)
    output = spec.output.path
    folder = (to or f"{output}/{STATE_FOLDER}/features").rstrip("/")
    store = sink if to is None else connect(folder, spec.output.storage_options)
    target = models.fetch(spec.model.target)
    draft = models.fetch(spec.model.draft) if layers is None and spec.model.draft is not None else None
    at, width = engines.layers(target, layers, draft, spec.model.aux_layers)
    token_bytes = len(at) * width * (4 if dtype == "float32" else 2)
    files = list(_files(sink, output, target.identity, max(1, FILE_BYTES // token_bytes)))
    found = {url.rsplit("/", 1)[-1]: url for url in store.find(folder, recursive=False)}
    there = {name: url for name, url in found.items() if name.startswith("states-")}
    _own(store, folder, {"layers": list(at), "dtype": dtype, "target_identity": target.identity}, empty=not there)
    store.delete(_outdated(there, files))
    todo = [file for file in files if file.name not in there]
    work = Work(folder, at, dtype, files, todo, sum(file.num_tokens for file in todo) * token_bytes)
    started(work)
    if not todo:
        return work
    capture = engines.capture(spec, target, at, dtype)
    try:
        for file in todo:
            data = _captured(capture, sink, file, at, draining)
            store.create(f"{folder}/{file.name}", data)
            stored(file)
    finally:
        capture.close()
    return work


def read(store: Store, folder: str) -> Iterator[tuple[str, Iterator[tuple[tuple[str, str, int], dict[str, Any]]]]]:
    """The name of each file in `folder`, with its rows: (shard, row_id, sample), and the row's tensors of its names.

    Raises:
        InputError: there is no file.
    """
    import torch
    from safetensors.torch import load

    found = {url.rsplit("/", 1)[-1]: url for url in store.find(folder.rstrip("/"), recursive=False)}
    names = sorted(name for name in found if name.startswith("states-"))
    if not names:
        raise InputError(f"{folder}: holds no hidden states; run `batchgen features` first")
    for name in names:
        data = store.read(found[name])
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        tensors = load(data)
        lengths = tensors.pop("lengths").tolist()
        shard, row_ids, samples = name.split("-")[1], json.loads(header["row_ids"]), json.loads(header["samples"])
        keys = zip([shard] * len(row_ids), row_ids, samples, strict=True)
        parts = zip(*(torch.split(tensor, lengths) for tensor in tensors.values()), strict=True)
        rows = ((key, dict(zip(tensors, part, strict=True))) for key, part in zip(keys, parts, strict=True))
        yield name.removesuffix(".safetensors"), rows


def layers(store: Store, folder: str) -> list[int]:
    """After which decoder layers the hidden states in `folder` are.

    Raises:
        InputError: there are none.
    """
    try:
        found: list[int] = json.loads(store.read(f"{folder.rstrip('/')}/{_MANIFEST}"))["layers"]
    except FileNotFoundError as error:
        raise InputError(f"{folder}: holds no hidden states; run `batchgen features` first") from error
    return found


def _own(store: Store, folder: str, facts: dict[str, Any], *, empty: bool) -> None:
    """Say what the folder holds, or see that it holds that already; one without features may change its mind."""
    url, text = f"{folder}/{_MANIFEST}", json.dumps(facts, indent=2).encode()
    if store.create(url, text):
        return
    if empty:
        store.put(url, text)
        return
    theirs = json.loads(store.read(url))
    differing = [
        f"{name} {theirs.get(name)}, not {value}" for name, value in facts.items() if theirs.get(name) != value
    ]
    if differing:
        raise OutputConflictError(
            f"{folder}: holds features of {'; '.join(differing)}; choose another folder with --to"
        )


def _outdated(there: dict[str, str], files: Sequence[File]) -> list[str]:
    """URLs of what was captured of parts that were replaced since."""
    names = {file.name for file in files}
    keys = {name.split("-")[1] for name in names}
    return [url for name, url in there.items() if name not in names and name.split("-")[1] in keys]


def _files(store: Store, output: str, target: str, most_tokens: int) -> Iterator[File]:
    """What each file is to hold, parts in the order of their names; those of other targets (`--mix`) are left out."""
    found = write.parts(store, output)
    if not found:
        raise InputError(f"{output}: holds no finished part yet; submit the job first")
    others: Counter[str] = Counter()
    for key, url in sorted(found.items(), key=lambda item: item[1]):
        lengths, commit, of = _lengths(store, url)
        if of != target:
            others[of] += 1
            continue
        start = tokens = 0
        for row, length in enumerate([*lengths, most_tokens]):
            if tokens and tokens + length > most_tokens:
                yield File(f"states-{key}-{commit}-{start:06d}.safetensors", url, start, row, tokens)
                start, tokens = row, 0
            tokens += length
    theirs = ", ".join(others)
    if others.total() == len(found):
        raise OutputConflictError(f"{output}: its rows are of the target {theirs}, not of the one named now ({target})")
    if others:
        log.info("left out: %d parts of the target %s", others.total(), theirs)


def _lengths(store: Store, url: str) -> tuple[list[int], str, str]:
    """Tokens of each finished row of a part, what names the part's content, and which target wrote it."""
    with store.open(url) as stream:
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise InputError(f"{url}: has no column {missing[0]}; hidden states need output.token_ids: true")
        commit = (file.schema_arrow.metadata or {}).get(b"batchgen.commit", b"").decode()[:8]
        target = write.target_of(file.schema_arrow)
        table = file.read(columns=["status", "prompt_tokens", "completion_tokens"])
    table = table.filter(pc.equal(table["status"], "ok"))
    return pc.add(table["prompt_tokens"], table["completion_tokens"]).to_pylist(), commit, target


def _captured(capture: Capture, store: Store, file: File, layers: Sequence[int], draining: Callable[[], bool]) -> bytes:
    with store.open(file.part) as stream:
        table = pq.ParquetFile(stream, page_checksum_verification=True).read(columns=[*_COLUMNS, *_IF_THERE])
    table = table.filter(pc.equal(table["status"], "ok")).slice(file.start, file.stop - file.start)
    rows = table.to_pylist()
    for row in rows:
        row["ids"], row["mask"] = record.ids_and_mask(row)
        if len(row["ids"]) > capture.max_tokens:  # vLLM draws a token more, which its context must hold
            log.info("%s: the last token of row %s is left out", file.part, row["row_id"])
            row["ids"], row["mask"] = row["ids"][: capture.max_tokens], row["mask"][: capture.max_tokens]
    states = []
    for first in range(0, len(rows), _ROWS):
        some = rows[first : first + _ROWS]
        if draining():
            raise DrainedError(f"stopped before {file.name}; run the same command again to go on")
        states += capture.states([row["ids"] for row in some])
    return _encode(rows, states, layers)


def _encode(rows: Sequence[dict[str, Any]], states: Sequence[Any], layers: Sequence[int]) -> bytes:
    import torch
    from safetensors.torch import save

    ids = [row["ids"] for row in rows]
    tensors = {
        "hidden_states": torch.cat(list(states)),
        "token_ids": torch.tensor([token for row in ids for token in row], dtype=torch.int64),
        "loss_mask": torch.tensor([each for row in rows for each in row["mask"]], dtype=torch.uint8),
        "lengths": torch.tensor([len(row) for row in ids], dtype=torch.int64),
    }
    named = {"row_ids": [row["row_id"] for row in rows], "samples": [row["sample"] for row in rows]}
    metadata = {name: json.dumps(value) for name, value in (named | {"layers": list(layers)}).items()}
    data: bytes = save(tensors, metadata)
    return data
