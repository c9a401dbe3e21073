"""Where the draft head is right and where it is not, from the rows of finished parts; and whether that has changed.

A rate is a ratio of sums over rows, accepted / drafted tokens, and rows are what varies: the standard error is that of
a ratio estimator (Cochran, Sampling Techniques, 6.4), from each row's residual accepted - rate * drafted. Two runs are
compared on the rows that both have, where there are any: what the prompts share cancels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from batchgen import write
from batchgen.errors import InputError
from batchgen.record import STRETCH_TOKENS, Stretch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import polars as pl

    from batchgen.store import Store

_LENGTHS = {"length": "completion_tokens", "prompt_length": "prompt_tokens"}
# Not a column but a part of a row.
_POSITION = "position"
_COUNTS = ("completion_tokens", "target_steps", "draft_steps", "draft_tokens", "accepted_tokens")
_DEPTHS = ("drafted_per_depth", "accepted_per_depth")
_COLUMNS = ("row_id", "sample", "status", "prompt_tokens", *_COUNTS, *_DEPTHS)
# Of rows that are conversations a list, of which one leaf tells the length.
_ANSWERS, _LEAF = "answers", "answers.list.element.start"
# Enough rows to tell a drift by, and not a night's work.
_PARTS_LOOKED_AT = 64
# Of a normal distribution, 95 % lie within so many standard errors.
CONFIDENCE = 1.96


@dataclasses.dataclass(slots=True)
class Group:
    """Finished rows that have something in common.

    rate: accepted / drafted tokens, None where nothing was drafted; `error` is what it is uncertain by (95 %), None
        of one row, which cannot tell
    length: tokens a target pass, bonus token included
    by_depth: of passes that verified a draft token at depth 1, 2, ... the share that accepted one
    passes_share: of the job's target passes, how many went into these rows: where a better head would help most
    """

    name: str
    rows: int
    tokens: int
    passes_share: float
    rate: float | None
    error: float | None
    length: float | None
    by_depth: list[float]


@dataclasses.dataclass(frozen=True, slots=True)
class Drift:
    """How the acceptance rate of this run differs from another's; `error` is what `change` is uncertain by (95 %).

    `rows` are those that both runs have, by which they are compared; 0: none, so all of either were.
    """

    before: float
    now: float
    change: float
    error: float
    rows: int

    @property
    def beyond_noise(self) -> bool:
        """Whether the change is larger than what two runs of one head differ by."""
        return abs(self.change) > self.error

    def fell_by_more_than(self, most: float) -> bool:
        """Whether it surely fell by more than `most`."""
        return -self.change - self.error > most


def by(store: Store, output: str, columns: Sequence[str]) -> list[Group]:
    """All finished rows of a job's output, and those of each value of `columns` together, the lowest rate first.

    A column is one of the output's, kept ones included, or `length` or `prompt_length`: tokens, up to powers of two; or
    `position`: how far a row had come when its tokens were drafted, so that one row counts in several groups.

    Raises:
        InputError: the output has no parts, or no such column.
    """
    asked = [_LENGTHS.get(name, "by_position" if name == _POSITION else name) for name in columns]
    names = [f"by {name}" for name in columns]
    everything, partial = [], []
    for frame in _frames(store, _parts(store, output), [*_COLUMNS, *asked]):
        everything.append(_sums(frame, []))
        keyed = frame.with_columns(_bucket(name).alias(f"by {name}") for name in columns if name != _POSITION)
        partial.append(_sums(_by_position(keyed) if _POSITION in columns else keyed, names))
    total = _together(everything, []).to_dicts()[0]
    groups = [_group("all", total, total)]
    if columns:
        rows = _together(partial, names).to_dicts()
        found = [_group(", ".join(str(row[name]) for name in names), row, total) for row in rows]
        groups += sorted(found, key=lambda group: (math.inf if group.rate is None else group.rate, group.name))
    return groups


def _sums(frame: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """A row of sums for each value of the columns `names`."""
    import polars as pl

    # polars sums int32 in int32.
    sums = [pl.len().alias("rows"), *(pl.col(name).cast(pl.Int64).sum() for name in (_ANSWERS, *_COUNTS))]
    a, d = pl.col("accepted_tokens").cast(pl.Float64), pl.col("draft_tokens").cast(pl.Float64)
    sums += [(a * a).sum().alias("aa"), (a * d).sum().alias("ad"), (d * d).sum().alias("dd")]
    deepest = int(frame["drafted_per_depth"].list.len().max() or 0)  # type: ignore[arg-type]
    for i in range(deepest):
        for name in _DEPTHS:
            sums.append(pl.col(name).list.get(i, null_on_oob=True).cast(pl.Int64).sum().alias(f"{name} {i}"))
    return frame.group_by(names).agg(sums) if names else frame.select(sums)


def _together(partial: Sequence[pl.DataFrame], names: Sequence[str]) -> pl.DataFrame:
    import polars as pl

    stacked = pl.concat(partial, how="diagonal_relaxed")
    sums = [pl.col(name).sum() for name in stacked.columns if name not in names]
    return stacked.group_by(names).agg(sums) if names else stacked.select(sums)


def against(store: Store, output: str, other: Store, before: str) -> Drift:
    """How the acceptance of a job's output differs from that of the output folder `before`.

    Raises:
        InputError: one of them has no parts, or has drafted nothing.
    """
    mine, theirs = _drafts(store, _parts(store, output)), _drafts(other, _parts(other, before))
    for frame, name in ((mine, output), (theirs, before)):
        if not frame["draft_tokens"].sum():
            raise InputError(f"{name}: nothing was drafted, so there is no acceptance to compare")
    return _drift(mine, theirs)


def since(store: Store, new: Collection[str], old: Collection[str]) -> Drift | None:
    """How the acceptance in the parts `new`, URLs, differs from that in `old`; None where nothing can be compared.

    Of many old parts some are read, which their hashes choose.
    """
    some = sorted(old, key=lambda url: url[-24:])[:_PARTS_LOOKED_AT]
    if not new or not some:
        return None
    mine, theirs = _drafts(store, new), _drafts(store, some)
    if not mine["draft_tokens"].sum() or not theirs["draft_tokens"].sum():
        return None
    return _drift(mine, theirs)


def _drafts(store: Store, urls: Collection[str]) -> pl.DataFrame:
    import polars as pl

    key, counts = ["row_id", "sample"], ["draft_tokens", "accepted_tokens"]
    rows = pl.concat([frame.select(key + counts) for frame in _frames(store, urls, [*key, *counts, "status"])])
    # Where nights have the same ids a row would be compared with each of them, as if it were so many.
    return rows.group_by(key).agg(pl.col(counts).sum())


def _drift(mine: pl.DataFrame, theirs: pl.DataFrame) -> Drift:
    both = mine.join(theirs, on=["row_id", "sample"], suffix=" before")
    first, second = ("draft_tokens", "accepted_tokens"), ("draft_tokens before", "accepted_tokens before")
    if both[first[0]].sum() and both[second[0]].sum():
        now, now_off = _rate(both, *first)
        then, then_off = _rate(both, *second)
        return Drift(then, now, now - then, CONFIDENCE * _norm(now_off - then_off), both.height)
    now, now_off = _rate(mine, *first)
    then, then_off = _rate(theirs, *first)
    return Drift(then, now, now - then, CONFIDENCE * math.hypot(_norm(now_off), _norm(then_off)), 0)


def _rate(frame: pl.DataFrame, drafted: str, accepted: str) -> tuple[float, pl.Series]:
    """The rate, and what each row makes it differ by."""
    d, a = frame[drafted].cast(float), frame[accepted].cast(float)
    total = float(d.sum())
    rate = float(a.sum()) / total
    return rate, (a - rate * d) / total


def _norm(values: pl.Series) -> float:
    return math.sqrt(float((values * values).sum()))


def _group(name: str, row: dict[str, Any], total: dict[str, Any]) -> Group:
    drafted, accepted, steps = row["draft_tokens"], row["accepted_tokens"], row["target_steps"]
    rate = accepted / drafted if drafted else None
    error = None
    if rate is not None and row["rows"] > 1:
        residuals = max(0.0, row["aa"] - 2 * rate * row["ad"] + rate**2 * row["dd"])
        error = CONFIDENCE * math.sqrt(residuals * row["rows"] / (row["rows"] - 1)) / drafted
    depths: list[float] = []
    while num_drafted := row.get(f"drafted_per_depth {len(depths)}"):
        depths.append(row[f"accepted_per_depth {len(depths)}"] / num_drafted)
    return Group(
        name=name,
        rows=row["rows"],
        tokens=row["completion_tokens"],
        passes_share=steps / total["target_steps"] if total["target_steps"] else 0.0,
        rate=rate,
        error=error,
        length=(row["completion_tokens"] - row[_ANSWERS]) / steps if steps else None,
        by_depth=depths,
    )


def _by_position(frame: pl.DataFrame) -> pl.DataFrame:
    """A row for each stretch of a row's output in which it ran."""
    import polars as pl

    stretch = pl.col("by_position").struct
    fields = [stretch.field(name) for name in Stretch._fields]
    # Each pass gives a token beside the accepted ones.
    tokens = pl.sum_horizontal(map(stretch.field, ("accepted_tokens", "accepted_lookup_tokens", "target_steps")))
    found = (
        frame.with_columns(pl.int_ranges(pl.col("by_position").list.len()).alias("place"))
        .explode("by_position", "place")
        .filter(stretch.field("target_steps") > 0)
    )
    first = pl.when(pl.col("place") > 0).then(STRETCH_TOKENS * 2 ** (pl.col("place") - 1)).otherwise(0).cast(pl.Int64)
    replaced = [*fields, tokens.alias("completion_tokens"), pl.lit(0).alias(_ANSWERS)]
    replaced.append(pl.format("from {}", first).alias(f"by {_POSITION}"))
    return found.with_columns(*replaced, pl.lit([], pl.List(pl.Int32)).alias("drafted_per_depth"))


def _bucket(name: str) -> pl.Expr:
    import polars as pl

    if name not in _LENGTHS:
        return pl.col(name)
    tokens = pl.col(_LENGTHS[name]).clip(lower_bound=1).cast(pl.Float64)
    upper = (2 ** (tokens.log(2) - 1e-9).ceil()).cast(pl.Int64)
    return pl.format("up to {}", upper)


def _parts(store: Store, output: str) -> list[str]:
    found = write.parts(store, output)
    if not found:
        raise InputError(f"{output}: holds no finished part yet; submit the job first")
    return list(found.values())


def _frames(store: Store, urls: Collection[str], columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """The finished rows of each part, with the number of their answers."""
    import polars as pl

    for url in sorted(urls):
        with store.open(url) as stream:
            file = pq.ParquetFile(stream, page_checksum_verification=True)
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                names = ", ".join([*_LENGTHS, *file.schema_arrow.names])
                raise InputError(f"{url}: has no column {missing[0]}; there are {names}")
            frame = pl.from_arrow(file.read(columns=[*dict.fromkeys(columns), _LEAF]))
        assert isinstance(frame, pl.DataFrame)
        answers = pl.col(_ANSWERS).list.len() if _ANSWERS in frame.columns else pl.lit(1)
        yield frame.filter(pl.col("status") == "ok").with_columns(answers.alias(_ANSWERS))
