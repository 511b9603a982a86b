"""The results as reStructuredText, and their place in README.rst."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import OURS, RCLONE, Results
from benchmarks.targets import targets

BEGIN = ".. {block} begin: written by `make bench ARGS=--write`"
END = ".. {block} end"


def render(results: Results) -> str:
    """Return the tables of what ran."""
    parts = ["\n".join(f"- {line}" for line in results.conditions)]
    if held := targets(results):
        rows = [
            (
                target.what,
                f"{'≥' if target.at_least else '≤'} {target.bound:g}",
                _number(target.measured),
                "met" if target.met else "**missed**",
            )
            for target in held
        ]
        title = "Ratios to reach"
        parts.append(_section(title, ("Ratio", "Wanted", "Measured", "Verdict"), rows))
    if results.rates:
        calls_head = (
            "Call",
            "Connections",
            "Volumes",
            "volplugin",
            "rclone",
            "Ratio",
            "Note",
        )
        parts.append(_section("Calls in a second", calls_head, _rates(results)))
    measures_head = ("What", "Unit", "volplugin", "Beside", "which is", "Ratio")
    titles = dict.fromkeys(measure.table for measure in results.measures.values())
    parts += [
        _section(title, measures_head, _measures(results, title)) for title in titles
    ]
    return "\n\n".join(parts) + "\n"


def write(text: str, readme: Path, block: str) -> None:
    """Put the tables between README's markers of a block, in place of those there."""
    begin_line, end_line = BEGIN.format(block=block), END.format(block=block)
    before, begin, rest = readme.read_text().partition(begin_line)
    _, end, after = rest.partition(end_line)
    if not begin or not end:
        raise ValueError(f"{readme} lacks the marker {begin_line!r} or {end_line!r}")
    readme.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def _rates(results: Results) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for call, connections, volumes, server in sorted(
        results.rates, key=lambda key: (key[0], key[2], key[1])
    ):
        if server != OURS:
            continue
        ours = results.rate(call, connections, volumes, OURS)
        # A tmpfs is mounted for ours; what rclone mounts, by FUSE, it mounts anyway.
        peer_call = call.partition(",")[0]
        peer_key = (peer_call, connections, volumes, RCLONE)
        peer = results.rate_if_run(*peer_key)
        hung = results.hung.get(peer_key)
        rows.append(
            (
                call,
                str(connections),
                f"{volumes:,}",
                _number(ours),
                "" if peer is None else _number(peer),
                "" if peer is None else _number(ours / peer),
                f"rclone hung, {hung}×" if hung else "",
            )
        )
    return rows


def _measures(results: Results, table: str) -> list[tuple[str, ...]]:
    return [
        (
            measure.what,
            measure.unit,
            _number(measure.ours),
            "" if measure.peer is None else _number(measure.peer),
            measure.peer_name,
            "" if measure.ratio is None else _number(measure.ratio),
        )
        for measure in results.measures.values()
        if measure.table == table
    ]


def _number(value: float) -> str:
    """Write three figures, all of them before the point where there are more."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    rule = "  ".join("=" * max(width, 1) for width in widths)

    def line(row: Sequence[str]) -> str:
        cells = [
            # An empty first cell would continue the row above; no row has one.
            cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        return "  ".join(cells).rstrip()

    lines = [rule, line(head), rule, *map(line, rows), rule]
    return "\n".join([title, "~" * len(title), "", *lines])
