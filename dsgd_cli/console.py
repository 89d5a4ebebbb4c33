"""All terminal text. Human text goes to stderr, results to stdout, `--json` makes JSON lines.

Under a terminal some live lines show the run (`view`), redrawn at most five times a second, below
the log lines; without one a plain line is printed every 10 s. What hosts print is shown with
control characters escaped, so that no log line can move the cursor or write to the clipboard. A
terminal that has gone away (SIGHUP) is not an error.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dsgd_cli.contract.errors import DsgdError
from dsgd_cli.contract.names import counted
from dsgd_cli.view import View, aligned

SCHEMA = {"type": "version", "schema": "dsgd/1"}
REDRAW_S = 0.2
PLAIN_S = 10.0
COLOURS = {"coordinator": "35", "server": "34", "worker": "36"}

Message = Mapping[str, Any]


class Console:
    """Where a command's text goes. Safe to call from several threads."""

    def __init__(
        self,
        as_json: bool = False,
        out: IO[str] | None = None,
        err: IO[str] | None = None,
        logs_are_results: bool = False,
    ) -> None:
        self.as_json = as_json
        self.reader_is_gone = False  # of stdout
        self._logs_are_results = logs_are_results
        self._out = out or sys.stdout or io.StringIO()  # None: the shell closed it
        self._err = err or sys.stderr or io.StringIO()
        self._lock = threading.RLock()  # a signal handler may print in the middle of printing
        self._live = self._err.isatty() and os.environ.get("TERM", "") != "dumb" and not as_json
        self._colour = _wants_colour(self._err)
        self._view = View()
        self._lines: list[str] = []  # the live ones
        self._drawn = 0  # how many of them are on the screen
        self._drawn_at = 0.0
        if as_json:
            self.result(SCHEMA)

    # -- results: stdout

    def result(self, message: Message) -> None:
        """One JSON line on stdout."""
        self._write(self._out, json.dumps(message) + "\n")

    def text(self, text: str) -> None:
        """A result as text on stdout."""
        self._write(self._out, text.rstrip("\n") + "\n")

    # -- human text: stderr

    def note(self, text: str) -> None:
        """Something worth knowing."""
        self._above(printable(text))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        """Columns, aligned."""
        return "\n".join(aligned([head, *rows]))

    def log_line(self, process: str, host: str, line: str, stream: str = "stdout") -> None:
        """A line that a process printed: `worker/3@gpu2 | ...`."""
        if self.as_json:
            message = {"type": "log", "process": process, "host": host, "stream": stream}
            self.result({**message, "line": line})
            return
        role = process.split("/")[0]
        prefix = self._paint(COLOURS.get(role, "0"), f"{process}@{host} | ".rjust(20))
        if self._logs_are_results:
            self.text(prefix + printable(line))
        else:
            self._above(prefix + printable(line))

    def error(self, error: DsgdError) -> None:
        """The last thing on the screen: what, the evidence, the remedy."""
        if self.as_json:
            self.result(
                {
                    "type": "error",
                    "error": type(error).__name__,
                    "message": error.message,
                    "details": list(error.details),
                    "remedy": error.remedy,
                    "exit_code": error.exit_code,
                }
            )
        lines = [printable(line) for line in error.details]
        if error.exit_code == 3:  # the mistakes come first, their count last
            lines.append(printable(error.message))
        else:
            lines.insert(0, self._paint("31", "error: ") + printable(error.message))
        if error.remedy:
            lines.append(f"fix: {printable(error.remedy)}")
        self._above("\n".join(lines))

    def warn(self, lines: Sequence[str]) -> None:
        """What went wrong besides."""
        for line in lines:
            self._above(self._paint("33", "warning: ") + printable(line))

    def summary(self, summary: Message, receipt: object, kept: bool) -> None:
        """The last words of a training."""
        lines = [summary_line(summary)]
        if summary.get("model"):
            lines.append(f"model: {summary['model']}")
            lines += best_line(summary)
        run_dir = Path(summary["run_dir"])
        if run_dir.exists():
            lines.append(f"metrics and logs: {run_dir}/")
        if (run_dir / "report.html").exists():
            lines.append(f"report: {run_dir / 'report.html'}")
        if kept:
            lines.append("the cluster is still up (--keep): `dsgd down FILE` stops it")
        elif receipt is not None:
            lines.append(str(receipt))
        if not self.as_json:
            self.text("\n".join(lines))

    # -- progress

    def progress(self, message: Message) -> None:
        """A training's progress."""
        if self.as_json:
            if self._due(1.0):
                self.result(dict(message))
            return
        with self._lock:
            self._view.progress(message)
            if self._live:
                self._show_run()
            elif self._due(PLAIN_S):
                self._emit(self._err, self._view.head() + "\n")

    def record(self, record: Message) -> None:
        """A line of metrics.jsonl."""
        if self._live:
            with self._lock:
                self._view.record(record)
                self._show_run()

    def waiting(self, text: str) -> None:
        """What is waited for, on the live line; nothing when there is no terminal."""
        if self._live:
            with self._lock:
                self._wipe()
                self._lines = [printable(text)] if text else []
                self._draw()

    def progress_ends(self) -> None:
        """Leave the last progress line on the screen."""
        with self._lock:
            if self._lines:
                self._wipe()
                self._lines = self._lines[:1]
                self._draw()
                self._emit(self._err, "\n")
                self._lines, self._drawn = [], 0
            self._view = View()

    def _show_run(self) -> None:
        if self._due(REDRAW_S):
            self._wipe()
            self._lines = self._view.lines(max(1, shutil.get_terminal_size().lines - 2))
            self._draw()

    def _due(self, every_s: float) -> bool:
        now = time.monotonic()
        if now - self._drawn_at < every_s:
            return False
        self._drawn_at = now
        return True

    def _draw(self) -> None:
        """The live lines, below all else; the cursor stays behind the last."""
        width = shutil.get_terminal_size().columns
        self._emit(self._err, "\n".join(line[: width - 1] for line in self._lines))
        self._drawn = len(self._lines)

    def _wipe(self) -> None:
        """Takes the live lines off the screen."""
        if self._drawn:
            up = f"\x1b[{self._drawn - 1}A" if self._drawn > 1 else ""
            self._emit(self._err, f"\r{up}\x1b[J")
            self._drawn = 0

    def _above(self, text: str) -> None:
        """Print above the live lines."""
        with self._lock:
            self._wipe()
            self._emit(self._err, text + "\n")
            self._draw()

    def _write(self, file: IO[str], text: str) -> None:
        with self._lock:
            self._emit(file, text)

    def _emit(self, file: IO[str], text: str) -> None:
        try:
            file.write(text)
            file.flush()
        except (OSError, ValueError):  # the terminal or the reader went away
            self.reader_is_gone |= file is self._out

    def _paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text


def printable(text: str) -> str:
    """`text` with all that moves a cursor or turns text around (but tab, newline) as escapes."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\t\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def summary_line(summary: Message) -> str:
    """`converged  accuracy 0.9722  at step 900, epoch 20, in 1.4s   2 workers, 2 servers ...`."""
    outcome, reason = str(summary["outcome"]), str(summary.get("reason") or "")
    outcome = how_it_ended(outcome, reason)
    if not summary["steps"]:
        return f"{outcome} before the first step"
    parts = [outcome]
    if summary.get("value") is not None:
        parts.append(f"{summary['metric']} {float(summary['value']):.4f}")
    if summary.get("loss") is not None and summary.get("metric") != "loss":
        parts.append(f"loss {float(summary['loss']):.4f}")
    parts.append(f"at step {summary['steps']} in {summary['seconds']:.1f}s")
    workers, servers = summary["workers"], summary["servers"]
    parts.append(f"{counted(workers, 'worker')}, {counted(servers, 'server')}")
    unit = "steps" if summary["algorithm"] == "sandblaster" else "batches"
    parts.append(f"{summary['batches_per_second']:.0f} {unit}/s")
    staleness = summary.get("staleness") or {}
    if staleness.get("p95"):
        parts.append(f"staleness {staleness['median']} (p95 {staleness['p95']})")
    if staleness.get("dropped"):
        parts.append(f"{staleness['dropped']} pushes came too late")
    return "  ".join(parts)


def how_it_ended(outcome: str, reason: str) -> str:
    """The outcome in words: where there was no target, with what came instead."""
    return f"finished ({reason})" if outcome == "finished" else outcome


def best_line(summary: Message) -> list[str]:
    """Where the best model is, if the last one is not as good."""
    best = summary.get("best")
    if not best or not best["model"] or best["value"] == summary.get("value"):
        return []
    return [
        f"best:  {best['model']}  ({best['metric']} {best['value']:.4f} at step {best['step']})"
    ]


def _wants_colour(file: IO[str]) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return file.isatty() and os.environ.get("TERM", "") != "dumb"
