"""A run on a terminal: a few lines on the whole, what holds it up, and a table of its ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rwkvmpi.cluster.logs import duration, quantity
from rwkvmpi.telemetry.ranks import LONG_WAIT_S, Rank
from rwkvmpi.telemetry.sample import printable

Sort = Literal["rank", "rate", "wait"]
MAX_STALLS = 4
_BAR = 20
_STATES = {"running": "bold green", "finished": "bold green", "stopped": "bold yellow", "crashed": "bold red"}
_OLD_JOB_S = 15.0


class _Column(NamedTuple):
    """from_width: the narrowest terminal that has it."""

    title: str
    cell: Callable[[Rank], str]
    from_width: int = 0
    right: bool = False


_COLUMNS = (
    _Column("rank", lambda rank: str(rank.rank), right=True),
    _Column("host", lambda rank: rank.host, 96),
    _Column("place", lambda rank: "/".join(map(str, rank.place)) if rank.place else "", 64),
    _Column("phase", lambda rank: rank.phase),
    _Column("chunk", lambda rank: "" if rank.chunk is None else f"{rank.chunk:,}", right=True),
    _Column("tokens/s", lambda rank: "" if rank.rate is None else quantity(rank.rate), right=True),
    _Column("busy", lambda rank: "" if rank.busy is None else f"{rank.busy:.0%}", 64, right=True),
    _Column("waits for", lambda rank: _waits(rank)),
    _Column("waited", lambda rank: _waited(rank), 110),
    _Column("memory", lambda rank: _size(rank.memory), 84, right=True),
    _Column("GPU", lambda rank: _size(rank.device_memory), 84, right=True),
    _Column("commit", lambda rank: "" if rank.commit is None else str(rank.commit), 76, right=True),
    _Column("heard", lambda rank: "", right=True),
)


def arranged(ranks: Mapping[int, Rank], sort: Sort, only: Collection[int] | None) -> list[int]:
    """Numbers of the ranks to show, in order. rate: the slowest first; wait: who waits longest now, then in all."""
    chosen = [rank for number, rank in ranks.items() if only is None or number in only]
    if sort == "rate":
        chosen.sort(key=lambda rank: (rank.rate is None, rank.rate or 0.0, rank.rank))
    elif sort == "wait":
        chosen.sort(key=lambda rank: (-(rank.waits_since_s if rank.waits else 0.0), -rank.waited, rank.rank))
    else:
        chosen.sort(key=lambda rank: rank.rank)
    return [rank.rank for rank in chosen]


def draw(
    facts: Mapping[str, Any],
    ranks: Mapping[int, Rank],
    ages: Mapping[int, float],
    order: list[int],
    width: int,
    height: int | None,
    footer: str = "",
) -> RenderableType:
    """The view, at most `height` lines of `width` columns (height None: as many as it takes).

    facts: of watching.Moment. order: the ranks to show, see `arranged`. footer: a word at the very end.
    """
    above = _flow(_header(facts), width) + _flow(_counts(facts), width) + _flow(_times(facts), width)
    above += [_cut(sentence, width, "red") for sentence in facts["stalls"][:MAX_STALLS]]
    if (more := len(facts["stalls"]) - MAX_STALLS) > 0:
        above.append(Text(f"and {more:,} more such sentences", "red"))
    above += [_cut(words, width, "yellow") for words in facts["words"]]
    if facts["note"]:
        above.append(_cut(facts["note"], width, "yellow"))
    if height is not None:
        above = above[: max(1, height - 1)]  # the last line says how to leave
    rows = len(order) if height is None else max(0, height - len(above) - 2)  # the table's titles, and the last line
    shown = order[:rows]
    below = []
    if len(shown) < len(ranks):
        below.append(f"{len(ranks) - len(shown):,} of {len(ranks):,} ranks not shown (--sort rate|wait, --ranks 0-7)")
    if (size := facts["ranks_total"] or 0) > len(ranks) > 0:
        below.append(f"{size - len(ranks):,} of {size:,} not heard yet")
    below += [footer] if footer else []
    parts: list[RenderableType] = list(above)
    if shown:
        parts.append(_table([ranks[number] for number in shown], ages, set(facts["silent"]), width))
    if below:
        parts.append(_cut("; ".join(below), width, "dim"))
    return Group(*parts)


def _header(facts: Mapping[str, Any]) -> list[Text]:
    state = str(facts["state"])
    grid = " x ".join(map(str, facts["grid"])) if facts["grid"] else ""
    size = facts["ranks_total"]
    pieces = [
        Text(printable(facts["run"]), "bold"),
        Text(state, _STATES.get(state, "bold")),
        Text(printable(facts["task"] or "")),
        Text(printable(f"shard {facts['shard']}") if facts["shard"] else ""),
        Text(f"grid {grid}" if grid else ""),
        Text(f"{size:,} rank{'s' if size > 1 else ''}" if size else ""),
        Text(f"attempt {facts['attempt']}" if facts["attempt"] else ""),
        Text(printable(f"Slurm job {facts['slurm_job']}") if facts["slurm_job"] else ""),
    ]
    return [piece for piece in pieces if piece.plain]


def _counts(facts: Mapping[str, Any]) -> list[Text]:
    pieces = []
    done, total = facts["bytes_done"], facts["bytes_total"]
    if done is not None and total:
        share = min(1.0, done / total)
        pieces.append(Text(f"{'━' * round(_BAR * share)}{'╌' * (_BAR - round(_BAR * share))} {share:.0%}", "green"))
    if facts["documents_done"] is not None:
        of = f" of {facts['documents_total']:,}" if facts["documents_total"] is not None else ""
        pieces.append(Text(f"documents {facts['documents_done']:,}{of}"))
    if facts["documents_failed"]:
        pieces.append(Text(f"{facts['documents_failed']:,} failed", "red"))
    if facts["tokens_done"] is not None:
        pieces.append(Text(f"tokens {facts['tokens_done']:,}"))
    if facts["tokens_per_second"] is not None:
        silent = len(facts["silent"])
        partly = f" without {silent:,} silent rank{'s' if silent > 1 else ''}" if silent else ""
        pieces.append(Text(f"{quantity(facts['tokens_per_second'])} tokens/s{partly}", "bold"))
    if facts["tokens_per_second_average"] is not None:
        pieces.append(Text(f"{quantity(facts['tokens_per_second_average'])} tokens/s on average"))
    if facts["seconds_left"] is not None:
        at = " at the average rate" if facts["stalls"] else ""
        pieces.append(Text(f"about {duration(facts['seconds_left'])} left{at}"))
    if (facts["job_age_s"] or 0.0) > _OLD_JOB_S:
        pieces.append(Text(f"as of {duration(facts['job_age_s'])} ago", "yellow"))
    return pieces


def _times(facts: Mapping[str, Any]) -> list[Text]:
    pieces = []
    if facts["commit"] is not None:
        pieces.append(Text(f"commit {facts['commit']}, {duration(facts['commit_age_s'])} ago"))
    elif facts["state"] == "running":
        pieces.append(Text("no commit yet"))
    if facts["slurm_seconds_left"] is not None:
        pieces.append(Text(f"allocation ends in {duration(facts['slurm_seconds_left'])}"))
    if facts["way"] != "none" and facts["age_s"] is not None:
        way = "over the network" if facts["way"] == "network" else "from files"
        pieces.append(Text(f"ranks {way}, heard {duration(facts['age_s'])} ago"))
    elif facts["state"] == "running":
        pieces.append(Text("no samples of its ranks"))
    return pieces


def _flow(pieces: list[Text], width: int) -> list[Text]:
    """The pieces side by side, on as many lines as they need; none is torn in two."""
    lines: list[Text] = []
    for piece in pieces:
        piece.truncate(width, overflow="ellipsis")
        if lines and lines[-1].cell_len + 3 + piece.cell_len <= width:
            lines[-1] = Text.assemble(lines[-1], "   ", piece)
        else:
            lines.append(piece)
    return lines


def _cut(sentence: str, width: int, style: str) -> Text:
    text = Text(printable(sentence), style, no_wrap=True, overflow="ellipsis")
    text.truncate(width, overflow="ellipsis")
    return text


def _table(ranks: list[Rank], ages: Mapping[int, float], silent: set[int], width: int) -> Table:
    columns = [column for column in _COLUMNS if width >= column.from_width]
    if not any(rank.device_memory for rank in ranks):
        columns = [column for column in columns if column.title != "GPU"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", width=width)
    for column in columns:
        share = {"waits for": 3, "waited": 2}.get(column.title)
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=share,
        )
    for rank in ranks:
        waits_long = rank.waits and rank.waits_since_s >= LONG_WAIT_S
        style = "bold red" if rank.rank in silent else "yellow" if waits_long else "dim" if rank.over else ""
        cells = [Text(column.cell(rank)) for column in columns[:-1]]
        table.add_row(*cells, Text(duration(ages.get(rank.rank, 0.0))), style=style)
    return table


def _waits(rank: Rank) -> str:
    if not rank.waits:
        return ""
    whom = f"rank {rank.waits_for}, " if rank.waits_for is not None else ""
    return f"{duration(rank.waits_since_s)}: {whom}{rank.waits_what}"


def _waited(rank: Rank) -> str:
    """Seconds waited so far for each neighbour, the longest first, and in all where something else was waited for."""
    shown = [f"{number}: {duration(value)}" for number, value in rank.neighbours if value >= 0.05]
    if rank.waited - sum(value for _, value in rank.neighbours) >= 0.05:
        shown.insert(0, f"in all {duration(rank.waited)}")
    return ", ".join(shown)


def _size(nbytes: float | None) -> str:
    return f"{quantity(nbytes)}B" if nbytes else ""
