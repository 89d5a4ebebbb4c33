"""The report as one HTML file: no scripts, no fonts, no pictures from elsewhere. Pure.

The choice between step, epoch and second is three radio buttons and CSS. A policy in the page
forbids every request, so that a hostile name in a run cannot make one either.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from dsgd_cli import __version__
from dsgd_cli.reporting import series
from dsgd_cli.reporting.charts import Figure, is_empty
from dsgd_cli.reporting.runs import Run
from dsgd_cli.reporting.svg import COLOURS, svg

VIEWS = ("step", "epoch", "second")
# Okabe and Ito's colours, which people with any colour vision tell apart; lighter ones for dark.
# The last four are for sweeps: more than eight runs are nothing unusual there.
LIGHT = (
    *("#0072b2", "#d55e00", "#009e73", "#b5508f", "#c98500", "#3f9bd1", "#6b4fbb", "#5f6b73"),
    *("#7a4a2b", "#7d8f00", "#d6409f", "#111111"),
)
DARK = (
    *("#5ab4f0", "#ff8a4c", "#2fcf9f", "#e69ac8", "#f0b93a", "#9ad4f7", "#b3a1ff", "#aab4bb"),
    *("#c79a7b", "#c5d64a", "#ff7fc4", "#f0f0f0"),
)
GOOD = ("converged", "finished")  # outcomes that need no words
HEAD = (
    *("run", "algorithm", "workers", "servers", "outcome", "metric", "loss", "steps", "epochs"),
    *("seconds", "batches/s"),
)


def page(runs: Sequence[Run], figures: Sequence[Figure]) -> str:
    """The whole file."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} – dsgd report</title>
<style>{style()}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{_notices(runs)}
{_summary(runs)}
{_choice()}
<main>
{"".join(_figure(figure) for figure in figures)}
</main>
<footer>dsgd {__version__}: {escape(", ".join(str(run.folder) for run in runs))}</footer>
</body>
</html>
"""


def _notices(runs: Sequence[Run]) -> str:
    said = [trouble for run in runs for trouble in run.troubles]
    said += [
        f"{run.name} {run.summary['outcome']}: {run.summary.get('reason')}"
        for run in runs
        if run.ended and run.summary["outcome"] not in GOOD
    ]
    return "".join(f'<p class="notice" role="status">{escape(text)}</p>' for text in said)


def _summary(runs: Sequence[Run]) -> str:
    rows = []
    for place, run in enumerate(runs):
        swatch = f'<i class="swatch c{place % COLOURS}"></i>' if len(runs) > 1 else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in summary_cells(run))
        rows.append(f'<tr><th scope="row">{swatch}{escape(run.name)}</th>{cells}</tr>')
    return (
        '<div class="wide"><table class="runs"><caption>Summary</caption>'
        f"{_head(HEAD)}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def summary_cells(run: Run) -> list[str]:
    """The row of a run, without its name. A run that died is told from its records."""
    about = run.summary
    metric = f"{about['metric']} {_short(about.get('value'))}" if about.get("metric") else "–"
    epochs = [number for record in run.of("epoch") if (number := record.get("epoch")) is not None]
    known = run.ended
    return [
        *(str(about.get(key, "–")) for key in ("algorithm", "workers", "servers")),
        str(about["outcome"]) if known else "died",
        metric,
        _short(about.get("loss")),
        _short(about.get("steps") if known else series.last_step(run)),
        _short(about.get("epochs") if known else max(epochs, default=0)),
        _short(about.get("seconds") if known else series.duration_s(run)),
        _short(about.get("batches_per_second")),
    ]


def _short(value: Any) -> str:
    number = series.number(value)
    if number is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{number:.4g}"


def _choice() -> str:
    """What the charts of losses and metrics are drawn over. The page's CSS does the rest."""
    buttons = "".join(
        f'<label><input type="radio" name="view" id="by-{view}"'
        f"{' checked' if view == 'step' else ''}> {view}</label>"
        for view in VIEWS
    )
    return f'<fieldset class="choice"><legend>Losses and metrics by</legend>{buttons}</fieldset>'


def _figure(figure: Figure) -> str:
    charts = []
    for view, chart in figure.views:
        name = f"{_anchor(figure.name)}-{view or 'all'}"
        kind = f"view by-{view}" if view else "view"
        title = f"{figure.title} by {view}" if view else figure.title
        charts.append(f'<div class="{kind}">{svg(chart, name, title)}</div>')
    legend = "".join(
        f'<li><i class="swatch c{key.colour % COLOURS}{" dashed" if key.dashed else ""}"></i>'
        f"{escape(key.label)}</li>"
        for key in figure.legend
    )
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    note = f'<p class="note">{escape(figure.note)}</p>' if figure.note else ""
    empty = all(is_empty(chart) for _, chart in figure.views)
    numbers = "" if empty or not figure.rows else _numbers(figure)
    return (
        f'<figure id="{_anchor(figure.name)}"><figcaption><h2>{escape(figure.title)}</h2>'
        f"{legend}</figcaption>{''.join(charts)}{note}{numbers}</figure>\n"
    )


def _numbers(figure: Figure) -> str:
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in figure.rows
    )
    return (
        f'<details><summary>Numbers</summary><div class="wide"><table>'
        f"<caption>{escape(figure.title)}</caption>{_head(figure.head)}<tbody>{rows}</tbody>"
        "</table></div></details>"
    )


def _head(names: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return f"<thead><tr>{cells}</tr></thead>"


def _anchor(name: str) -> str:
    """A name that may stand in an attribute, whatever a model calls its metrics."""
    return "".join(c if c.isascii() and (c.isalnum() or c == "-") else f"_{ord(c)}_" for c in name)


def style() -> str:
    """The page's CSS."""
    views = "".join(f"body:has(#by-{view}:checked) .by-{view}{{display:block}}" for view in VIEWS)
    without_has = "@supports not selector(:has(*)){.view{display:block}}"
    return (
        f":root{{{_variables(LIGHT)}{_LIGHT}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}{_DARK}}}}}"
        f"{''.join(_colour(number) for number in range(COLOURS))}{_STYLE}{views}{without_has}"
    )


def _variables(colours: Sequence[str]) -> str:
    return "".join(f"--c{number}:{colour};" for number, colour in enumerate(colours))


def _colour(number: int) -> str:
    return f".c{number}{{color:var(--c{number})}}"


_LIGHT = "--back:#fff;--card:#fff;--text:#1d2329;--dim:#57616b;--grid:#e3e7eb;--warn:#fff4e0;"
_DARK = "--back:#14181c;--card:#1b2026;--text:#e6eaee;--dim:#a3adb7;--grid:#333b43;--warn:#3a2d12;"
_STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem;max-width:1400px;background:var(--back);color:var(--text);
font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 1rem;overflow-wrap:anywhere}
h2{font-size:1rem;margin:0}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:1rem}
figure{margin:0;padding:1rem;border:1px solid var(--grid);border-radius:8px;background:var(--card);
min-width:0}
figcaption{display:flex;flex-wrap:wrap;gap:.3rem 1rem;align-items:baseline;margin-bottom:.5rem}
svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--dim)}
svg text.title{font-size:12px;fill:var(--text)}
.grid{stroke:var(--grid)}.axis{stroke:var(--dim)}
.line{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}
.line.dashed{stroke-dasharray:5 3}
.dots circle,.dot,.bar rect{fill:currentColor}
.dots.quiet circle{fill-opacity:0}.dots.quiet circle:hover{fill-opacity:1}
.dot{fill-opacity:.75}.dot:hover,.bar rect:hover{stroke:var(--text)}
.bar rect{fill-opacity:.9}
.mark{stroke:currentColor;stroke-width:1.5;stroke-dasharray:2 3}
.view{display:none}.view:not([class*=by-]){display:block}
.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem;list-style:none;margin:0;padding:0;
font-size:.85rem;color:var(--dim);overflow-wrap:anywhere;max-height:8.5em;overflow-y:auto}
.swatch{display:inline-block;width:1.3em;height:0;border-top:3px solid currentColor;
vertical-align:middle;margin-right:.4em}
.swatch.dashed{border-top-style:dashed}
.note,.empty,footer{font-size:.85rem;color:var(--dim);margin:.4rem 0 0;overflow-wrap:anywhere}
.empty{padding:2rem 0;text-align:center}
footer{margin-top:1.5rem}
.notice{background:var(--warn);border-left:4px solid var(--c4);padding:.5rem .8rem;margin:0 0 .6rem;
overflow-wrap:anywhere}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--dim);padding:.2rem 0}
th,td{text-align:left;padding:.25rem .9rem .25rem 0;border-bottom:1px solid var(--grid);
white-space:nowrap}
.choice{border:0;padding:0;margin:1.2rem 0 .8rem;display:flex;flex-wrap:wrap;gap:.3rem 1rem}
.choice legend{float:left;padding:0;margin-right:1rem}
details{margin-top:.5rem;font-size:.9rem}summary{cursor:pointer;color:var(--dim)}
details .wide{max-height:20rem;overflow-y:auto}
@media print{.view{display:block}.choice{display:none}.legend{max-height:none}
figure{break-inside:avoid}}
"""
