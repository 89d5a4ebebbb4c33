"""The page in a real browser: no complaint on the console, points in every chart, no text on text.

Needs Chromium. A copy of the page gets a script that measures what was laid out; the policy that
forbids scripts is taken out of that copy only. Without Chromium this is skipped, and says so;
DSGD_REQUIRE_BROWSER=1 makes it a failure.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dsgd_cli.reporting.figures import figures
from dsgd_cli.reporting.page import page
from dsgd_cli.reporting.runs import read_runs
from tests.reporting.runs import evaluate, event, folder, sweep, usual

MEASURE = """
<script>
const said = {charts: [], overlaps: [], outside: [], errors: []};
window.onerror = (message) => said.errors.push(String(message));
const boxes = (svg, what) =>
  [...svg.querySelectorAll(what)].map(e => [e, e.getBoundingClientRect()]);
for (const view of ["step", "epoch", "second"]) {
  document.getElementById("by-" + view).click();
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;  // of another view
    const title = svg.querySelector("title").textContent;
    const points = boxes(svg, "circle, rect").filter(([_, b]) => b.width > 0 && b.height > 0);
    said.charts.push([title, points.length]);
    const texts = boxes(svg, "text");
    for (const [e, b] of [...texts, ...points])
      if (b.left < frame.left - 6 || b.right > frame.right + 6 || b.top < frame.top - 6
          || b.bottom > frame.bottom + 6) said.outside.push([title, e.textContent]);
    texts.forEach(([e, b], i) => texts.slice(i + 1).forEach(([f, c]) => {
      if (b.left < c.right - 1 && c.left < b.right - 1 && b.top < c.bottom - 1
          && c.top < b.bottom - 1) said.overlaps.push([title, e.textContent, f.textContent]);
    }));
  }
}
said.wide = document.documentElement.scrollWidth - window.innerWidth;
const pre = document.createElement("pre");
pre.id = "said";
pre.textContent = JSON.stringify(said);
document.body.append(pre);
</script>
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if found is None:
        why = "no Chromium on this machine: apt-get install chromium"
        if os.environ.get("DSGD_REQUIRE_BROWSER") == "1":
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
    return found


def opened(chromium: str, path: Path, profile: Path, width: int = 1400) -> tuple[str, list[str]]:
    """The page's document after its scripts ran, and what the console has to say."""
    done = subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *(f"--user-data-dir={profile}", f"--window-size={width},2000"),
            *("--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "</html>" in done.stdout, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measured(chromium: str, path: Path, tmp_path: Path, width: int) -> dict[str, Any]:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    copy = tmp_path / "measured.html"
    copy.write_text(text.replace("</body>", f"{MEASURE}</body>"))
    dom, console = opened(chromium, copy, tmp_path / "profile", width)
    assert console == []
    found = re.search(r'<pre id="said">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None
    said: dict[str, Any] = json.loads(html.unescape(found[1]))
    return said


@pytest.mark.parametrize(("count", "width"), [(1, 1400), (3, 1400), (1, 420)])
def test_charts_have_points_and_no_text_is_on_text(
    chromium: str, tmp_path: Path, count: int, width: int
) -> None:
    homes = []
    for number in range(count):
        tiny = [evaluate(1.0 + step, step, auc=1e-7 * step) for step in range(1, 4)]
        trouble = [event(1.0, "lost", "worker/1"), event(1.2, "joined", "worker/1")]
        records = [*usual(workers=3, seconds=4 + number), *tiny, *trouble]
        homes.append(folder(tmp_path / f"some-cluster-20261127-07271{number}", records))
    runs = read_runs(homes)
    path = tmp_path / "report.html"
    path.write_text(page(runs, figures(runs)))
    dom, console = opened(chromium, path, tmp_path / "profile")
    assert console == []  # also what the policy refuses would be there
    once = 5 + (count == 1)  # charts over seconds alone: that of the shards is of one run
    assert dom.count("<svg") == 3 * 3 + once
    said = measured(chromium, path, tmp_path, width)
    assert said["errors"] == []
    assert len(said["charts"]) == 3 * 3 + 3 * once
    assert all(points > 0 for _, points in said["charts"]), said["charts"]
    assert said["overlaps"] == []
    assert said["outside"] == []
    assert said["wide"] <= 0  # the page is not wider than the window


@pytest.mark.parametrize("width", [1400, 420])
def test_a_sweeps_charts_have_them_too(chromium: str, tmp_path: Path, width: int) -> None:
    cells = []
    for count in (1, 2, 4, 16):
        for optimizer in ("{sgd: {learning_rate: 0.05}}", "{adagrad: {learning_rate: 0.02}}"):
            values = {"workers": str(count), "algorithm": "downpour", "optimizer": optimizer}
            about = {"examples_per_second": 1000.0 * count**0.8, "target": {"accuracy": 0.9}}
            cells.append((values, usual(seconds=2, slower=5 / count), about))
    runs = read_runs([sweep(tmp_path / "lab-sweep", cells)])
    path = tmp_path / "report.html"
    path.write_text(page(runs, figures(runs)))
    said = measured(chromium, path, tmp_path, width)
    points = dict(said["charts"])
    assert points["Seconds to the target by workers"] == 8
    assert points["Speed-up by workers"] == 8 + 4
    assert said["errors"] == said["overlaps"] == said["outside"] == []
    assert said["wide"] <= 0
