"""The rollouts of a run as HTML pages: one with all of them by group, and one for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from hermes_atropos.errors import ConfigurationError, RecordError
from hermes_atropos.messages import text_of
from hermes_atropos.trajectory import AgentResult, read_records
from hermes_atropos.viewer import to_html, view

__all__ = ["write_overview"]

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --quiet: #68717d; --line: #d9dde3; --bad: #b91c1c; }}
@media (prefers-color-scheme: dark) {{ :root {{ --quiet: #8c96a3; --line: #323842; --bad: #ff8a80; }} }}
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem; font: 14px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1rem; margin: 2rem 0 .3rem; overflow-wrap: anywhere; }}
p, th, .quiet {{ color: var(--quiet); }} p {{ margin: .2rem 0; }} .bad {{ color: var(--bad); }}
table {{ width: 100%; border-collapse: collapse; }}
th, td {{ text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0; border-top: 1px solid var(--line); }}
th {{ font-weight: normal; }} td.number, th.number {{ text-align: right; white-space: nowrap; }}
meter {{ width: 6rem; margin-right: .6rem; vertical-align: middle; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
{groups}
</html>
"""

TABLE = """<h2>{item}</h2>
<p>{summary}</p>
<table>
<tr><th>rollout<th class="number">score<th>ended<th class="number">steps<th class="number">trained tokens<th>why</tr>
{rows}
</table>
"""


@dataclass(slots=True)
class Row:
    """What the page says of one rollout.

    Attributes:
        group: what the rollouts of a group have in common: its id, or where there is none what was asked.
        item: the group's item, or what was asked.
        note: the verifier's reason, or what went wrong.
    """

    number: int
    group: str
    item: str
    score: float | None
    stop_reason: str
    steps: int
    trained: int
    note: str
    failed: bool


def write_overview(records: Path, folder: Path, tokenizer: Any = None) -> Path:
    """Write a page of all rollouts of a file, by group with their scores, and a page of each.

    Args:
        records: what ``HermesEnvConfig.records_path`` or ``write_record`` wrote.
        folder: where to; it is made.
        tokenizer: as in ``viewer.view``.

    Returns:
        The page of all; it links to the others.

    Raises:
        RecordError: the file can't be read, or is empty.
        ConfigurationError: the folder can't be written.
    """
    rows: list[Row] = []
    page = folder / "index.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, result in enumerate(read_records(records)):
            shown = view(result, tokenizer, title=f"{records.name}, record {number}")
            (folder / f"{number}.html").write_text(to_html(shown), "utf-8")
            rows.append(_row(number, result))
        if not rows:
            raise RecordError(f"{records} is empty: no rollout was written")
        page.write_text(_page(records.name, rows), "utf-8", "replace")
    except OSError as error:
        raise ConfigurationError(f"the pages cannot be written: {error}") from error
    return page


def _row(number: int, result: AgentResult) -> Row:
    known = result.metadata
    asked = (text_of(message.get("content")) for message in result.messages if message.get("role") == "user")
    item = str(known.get("item") or next(asked, "") or "")
    failure = known.get("failure") or result.error
    return Row(
        number=number,
        group=str(known.get("group") or item),
        item=item,
        score=known.get("score"),
        stop_reason=str(result.stop_reason),
        steps=result.num_steps,
        trained=result.fidelity.tokens_trained if result.fidelity else 0,
        note=str(failure or known.get("reason") or ""),
        failed=bool(failure),
    )


def _page(title: str, rows: list[Row]) -> str:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    scores = [row.score for row in rows if row.score is not None]
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    return PAGE.format(
        title=escape(title),
        summary=f"{len(rows)} rollouts in {len(groups)} groups, {_scores(rows)}",
        groups="".join(
            TABLE.format(
                item=escape(of_group[0].item[:300]),
                summary=f"{len(of_group)} rollouts, {_scores(of_group)}",
                rows="\n".join(_line(row, min(low, 0.0), max(high, 1.0)) for row in of_group),
            )
            for of_group in groups.values()
        ),
    )


def _scores(rows: Iterable[Row]) -> str:
    scores = [row.score for row in rows if row.score is not None]
    if not scores:
        return "none scored"
    return f"mean score {fmean(scores):.3g}, from {min(scores):.3g} to {max(scores):.3g}"


def _line(row: Row, low: float, high: float) -> str:
    score = "none"
    if row.score is not None:
        score = f'<meter min="{low}" max="{high}" value="{row.score}"></meter>{row.score:.3g}'
    return (
        f'<tr><td><a href="{row.number}.html">{row.number}</a><td class="number">{score}</td>'
        f"<td>{escape(row.stop_reason)}"
        f'<td class="number">{row.steps}<td class="number">{row.trained:,}'
        f'<td class="{"bad" if row.failed else "quiet"}">{escape(row.note[:500])}</tr>'
    )
