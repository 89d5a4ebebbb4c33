"""The command line: one short function per command; each imports its work inside its body.

Commands raise DsgdError; `main` alone prints it and turns it into the exit code. Nothing heavy is
imported before a command is known, so that `dsgd --help` answers at once.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsgd_cli import __version__
from dsgd_cli.contract.errors import DsgdError, Interrupted, UsageError

if TYPE_CHECKING:
    from dsgd_cli.console import Console
    from dsgd_cli.contract.spec import ClusterSpec
    from dsgd_cli.launcher.load import Loaded
    from dsgd_cli.launcher.phases import Phases

DEFAULT_FILE = "cluster.yaml"

file_argument = click.argument("file", default=DEFAULT_FILE, type=click.Path(path_type=Path))
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a field of the file: --set train.batch_size=64 (may be repeated).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout.")
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask: replace what differs.")


def _duration(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    """As in the file, `90s` or `10m`; a plain number is seconds. Gives seconds."""
    from dsgd_cli.contract.durations import parse_duration

    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except ValueError as why:
        raise click.BadParameter(f"{text!r} is not a duration: {why}") from None
    if not 0.1 <= seconds <= 1e9:
        raise click.BadParameter(f"{text!r} is out of range: at least 0.1s")
    return seconds


timeout_option = click.option(
    "--timeout",
    callback=_duration,
    metavar="TIME",
    help="Give up after this time, such as 90s or 10m: exit code 124.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dsgd")
def cli() -> None:
    """Train on a cluster of machines that you reach over SSH, or on this one.

    \b
    dsgd init                    write a commented cluster.yaml
    dsgd train cluster.yaml      start it, train, bring the model home, stop it
    dsgd sweep cluster.yaml workers=1,2,4      train every combination
    dsgd train --local 1x2 --model mlp --data digits      needs no file
    """


@cli.command()
@click.argument("file", default=DEFAULT_FILE, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def init(file: Path, force: bool) -> None:
    """Write a commented cluster description to FILE."""
    from dsgd_cli.launcher.describe import initial_file

    try:
        with file.open("w" if force else "x") as out:
            out.write(initial_file())
    except FileExistsError:
        raise UsageError(f"{file} exists", remedy="pass --force to overwrite it") from None
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    _console(False).note(f"wrote {file}\nnext: dsgd check {file}, then dsgd train {file}")


@cli.command()
@file_argument
@set_option
@json_option
def check(file: Path, overrides: Sequence[str], as_json: bool) -> None:
    """Find all mistakes in FILE. No network; exit code 3 when there are any."""
    console = _console(as_json)
    loaded = _load(console, file, overrides)
    from dsgd_cli.contract.names import counted
    from dsgd_cli.launcher.placement import place

    spec = loaded.spec
    placed = place(spec)
    hosts = {item.host for item in placed}
    if as_json:
        console.result({"type": "check", "errors": 0, "notes": list(loaded.notes)})
    else:
        console.text(
            f"{file}: ok  cluster {spec.name}: {counted(spec.servers.count, 'server')} and "
            f"{counted(spec.workers.count, 'worker')} on {counted(len(hosts), 'host')}"
        )


@cli.command()
def schema() -> None:
    """Print the JSON Schema of the cluster description, for editors."""
    from dsgd_cli.launcher.describe import json_schema

    _console(False).text(json_schema())


@cli.command()
@file_argument
@set_option
@json_option
@yes_option
@timeout_option
def up(
    file: Path, overrides: Sequence[str], as_json: bool, yes: bool, timeout: float | None
) -> None:
    """Start the cluster of FILE, or what is missing of it. Twice is the same as once."""
    console = _console(as_json)
    phases = _phases()
    with phases("check"):
        spec = _load(console, file, overrides).spec
    from dsgd_cli.launcher.commands import start

    report = start(spec, console, phases, confirm=_confirm(yes), timeout_s=timeout)
    if as_json:
        console.result(report)
        return
    console.text(console.table(("PROCESS", "HOST", "PID", "ADDRESS"), report["table"]))
    console.note(str(report["said"]))
    console.note(f"next: dsgd train {file} · dsgd status {file} · dsgd down {file}")


@cli.command(short_help="Start the cluster, train, bring the model home, stop it.")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@set_option
@json_option
@yes_option
@timeout_option
@click.option("--local", metavar="SxW", help="No file: S servers and W workers on this machine.")
@click.option("--model", metavar="MODEL", help="The model: mlp, softmax, cnn, or path/to/model.py.")
@click.option("--data", metavar="DATA", help="The data: digits, or path/to/data.py.")
@click.option("--keep", is_flag=True, help="Leave the cluster up afterwards.")
@click.option(
    "--allow-unconverged", is_flag=True, help="A limit that comes before the target is exit code 0."
)
@click.option(
    "--runs", default="runs", type=click.Path(path_type=Path), help="Where results go: runs/."
)
def train(
    file: Path | None,
    overrides: Sequence[str],
    as_json: bool,
    yes: bool,
    timeout: float | None,
    local: str | None,
    model: str | None,
    data: str | None,
    keep: bool,
    allow_unconverged: bool,
    runs: Path,
) -> None:
    """Start the cluster, train, bring the model home, and take everything down."""
    console = _console(as_json)
    phases = _phases()
    with phases("check"):
        spec = _spec_of_train(console, file, overrides, local, model, data)
    from dsgd_cli.launcher.train import Options
    from dsgd_cli.launcher.train import train as run

    options = Options(
        keep=keep,
        allow_unconverged=allow_unconverged,
        timeout_s=timeout,
        runs=runs,
        confirm=_confirm(yes),
    )
    result = run(spec, console, options, phases)
    console.warn(result.warnings)
    if not as_json:
        console.summary(result.summary(), result.receipt, result.kept)
    if result.error is not None:
        console.error(result.error)
    if as_json:
        console.result(result.summary())
    if result.error is not None:
        raise click.exceptions.Exit(result.error.exit_code)


@cli.command(short_help="Train every combination of some values, one after the other.")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("grid", nargs=-1, required=True, metavar="KEY=VALUE,VALUE…")
@set_option
@json_option
@yes_option
@timeout_option
@click.option(
    "--runs", default="runs", type=click.Path(path_type=Path), help="Where results go: runs/."
)
def sweep(
    file: Path,
    grid: Sequence[str],
    overrides: Sequence[str],
    as_json: bool,
    yes: bool,
    timeout: float | None,
    runs: Path,
) -> None:
    """Train every combination: dsgd sweep FILE workers=1,2,4 algorithm=downpour,synchronous."""
    console = _console(as_json)
    from dsgd_cli.launcher import sweep as sweeping
    from dsgd_cli.launcher.load import load
    from dsgd_cli.launcher.train import Options

    axes = sweeping.grid(grid)
    cells = sweeping.cells(axes, lambda values: load(file, [*overrides, *values]))
    console.warn(list(dict.fromkeys(note for cell in cells for note in cell.notes)))
    options = Options(allow_unconverged=True, timeout_s=timeout, runs=runs, confirm=_confirm(yes))
    made = sweeping.sweep(cells, console, options)
    if as_json:
        for summary in made.summaries:
            console.result(summary)
    else:
        console.text(console.table(made.head(), list(made.rows())))
        report = made.folder / "report.html"
        console.note(f"runs: {made.folder}/" + (f"  together: {report}" if report.exists() else ""))
    console.warn([*made.warnings, *(f"{cell.label}: {error}" for cell, error in made.errors)])
    made.check()


@cli.command()
@file_argument
@set_option
@json_option
@click.option("--metrics", is_flag=True, help="As Prometheus text, for its textfile collector.")
def status(file: Path, overrides: Sequence[str], as_json: bool, metrics: bool) -> None:
    """Show what runs, and until when."""
    if as_json and metrics:
        raise click.UsageError("give --json or --metrics, not both")
    console = _console(as_json)
    spec = _load(console, file, overrides).spec
    from dsgd_cli.launcher.commands import look

    report = look(spec, console)
    if metrics:
        from dsgd_cli.reporting.exposition import exposition

        console.text(exposition(report.as_json()))
    elif as_json:
        console.result(report.as_json())
    else:
        console.text(console.table(report.HEAD, report.rows))
        console.note(report.said)
    report.check()


@cli.command()
@file_argument
@set_option
@json_option
def top(file: Path, overrides: Sequence[str], as_json: bool) -> None:
    """Watch a run that somebody else has started. Ctrl-C leaves the view."""
    console = _console(as_json)
    spec = _load(console, file, overrides).spec
    from dsgd_cli.launcher.top import top as watch

    watch(spec, console)


@cli.command()
@file_argument
@set_option
@json_option
@click.option("-f", "--follow", is_flag=True, help="Wait for more lines; Ctrl-C leaves the view.")
@click.option("--role", multiple=True, metavar="ROLE", help="worker, worker/3, server, …")
@click.option("--host", multiple=True, metavar="HOST", help="Only the processes of this host.")
@click.option("--tail", default="100", metavar="N", help="The last N lines of each, or `all`.")
def logs(
    file: Path,
    overrides: Sequence[str],
    as_json: bool,
    follow: bool,
    role: Sequence[str],
    host: Sequence[str],
    tail: str,
) -> None:
    """Show what the processes of a running cluster printed."""
    if tail != "all" and not tail.isdigit():
        raise click.BadParameter("give a number of lines, or `all`", param_hint="--tail")
    console = _console(as_json, logs_are_results=True)
    spec = _load(console, file, overrides).spec
    from dsgd_cli.launcher.commands import show_logs

    show_logs(spec, console, follow=follow, roles=role, hosts=host, tail=tail)


@cli.command()
@file_argument
@set_option
@json_option
@click.option("--force", is_flag=True, help="Even when another dsgd holds the cluster.")
@click.option("--purge", is_flag=True, help="Also remove results that did not come home.")
def down(file: Path, overrides: Sequence[str], as_json: bool, force: bool, purge: bool) -> None:
    """Stop everything of the cluster on all hosts, and verify it. Twice is not an error."""
    console = _console(as_json)
    spec = _load(console, file, overrides).spec
    from dsgd_cli.launcher.commands import stop

    receipt = stop(spec, console, force=force, purge=purge)
    if as_json:
        console.result(
            {
                "type": "down",
                "stopped": receipt.stopped,
                "left": list(receipt.left),
                "results": list(receipt.results),
            }
        )
    else:
        console.text(f"{spec.name}: {receipt}")
        for path in receipt.results:
            console.note(f"not home yet: {path} (remove it with `dsgd down --purge`)")
    receipt.check()


@cli.command(short_help="Draw what runs recorded, as one page of charts.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER|FILE",
    help="Where to: a folder or FILE.html; default: the run's folder, for several this one.",
)
@json_option
def report(runs: Sequence[Path], out: Path | None, as_json: bool) -> None:
    """Draw what the runs of these folders (runs/NAME) recorded, laid over each other.

    Of the folder of a sweep, all of its runs.
    """
    console = _console(as_json)
    from dsgd_cli.reporting.write import write_report

    written = write_report(runs, out)
    console.warn(written.troubles)
    if as_json:
        console.result(written.as_json())
        return
    console.text(f"report: {written.report}")
    console.note(written.said_of_plots)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", metavar="DATA", help="As train.data, or a file or folder like the run's.")
@click.option(
    "--part",
    type=click.Choice(["held-out", "training", "all"]),
    help="Which examples; default: held-out, and all of other data that have no such part.",
)
@click.option("--no-labels", is_flag=True, help="--data has none: outputs, and no metrics.")
@click.option("--best", is_flag=True, help="The best model instead of the last one.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.npz|FILE.csv",
    help="Write the outputs there.",
)
@json_option
def predict(
    run: Path,
    data: str | None,
    part: str | None,
    no_labels: bool,
    best: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Compute the outputs and metrics of a run's model, here. RUN is its folder: runs/NAME."""
    console = _console(as_json)
    from dsgd_cli.launcher import predict as predicting

    options = predicting.Options(data=data, labels=not no_labels, part=part, best=best, out=out)
    result = predicting.predict(run, options)
    if as_json:
        console.result(result)
        return
    console.text(predicting.said(result))
    if out is not None:
        console.text(f"outputs: {out}")


@cli.command()
@file_argument
@set_option
@json_option
@yes_option
@timeout_option
@click.option("--size", "sizes", multiple=True, metavar="SIZE", help="32KB, 1MiB, 100MB, …")
@click.option("--block", "blocks", multiple=True, metavar="SIZE", help="Block size; default 1MiB.")
@click.option(
    "--channel", "channels", multiple=True, metavar="NAME", help="shm, tcp, `tcp, plain`, grpc."
)
@click.option("--workers", default=1, metavar="N", help="How many exchange at once; default 1.")
@click.option("--for", "for_s", default=0.5, metavar="SECONDS", help="How long each line takes.")
def bench(
    file: Path,
    overrides: Sequence[str],
    as_json: bool,
    yes: bool,
    timeout: float | None,
    sizes: Sequence[str],
    blocks: Sequence[str],
    channels: Sequence[str],
    workers: int,
    for_s: float,
) -> None:
    """Measure how fast parameters move on the hosts of FILE. Says what that means for its model."""
    console = _console(as_json)
    phases = _phases()
    with phases("check"):
        spec = _load(console, file, overrides).spec
    from dsgd_cli.launcher import bench as benching

    known = {carrier.label for carrier in benching.CARRIERS}
    if unknown := set(channels) - known:
        raise click.BadParameter(f"no such channel: {', '.join(sorted(unknown))}")
    options = benching.Options(
        sizes=_sizes(sizes) or benching.SIZES,
        blocks=_sizes(blocks) or (benching.BLOCK_BYTES,),
        channels=channels or tuple(carrier.label for carrier in benching.CARRIERS),
        workers=workers,
        for_s=for_s,
        confirm=_confirm(yes),
        timeout_s=timeout,
    )
    report = benching.bench(spec, console, options, phases)
    if as_json:
        for row in report.rows:
            console.result(row.as_json())
        console.result(report.as_json())
        return
    console.text(console.table(benching.HEAD, [row.row() for row in report.rows]))
    for sentence in report.meaning():
        console.text(sentence)
    console.warn(report.failures())
    console.note(benching.NOTES)
    console.note(f"{spec.name}: {report.receipt}")


def _sizes(texts: Sequence[str]) -> tuple[int, ...]:
    from dsgd_cli.launcher.bench import parse_size

    try:
        return tuple(parse_size(text) for text in texts)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; print its error, if any; exit with its code."""
    gc.freeze()  # what was imported so far lives as long as the process
    gc.set_threshold(50_000)  # imports make no garbage worth a tenth of the start-up time
    try:
        code = cli.main(args=arguments, prog_name="dsgd", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):  # before anything was begun
        _last_console().error(Interrupted("stopped by Ctrl-C", 130))
        _leave(130)
    except DsgdError as error:
        _last_console().error(error)
        _leave(error.exit_code)
    _leave(code if isinstance(code, int) else 0)  # what `ctx.exit` was given


def _leave(code: int) -> None:
    """Exit without waiting for daemon threads that may hold a lock of stdout."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


_consoles: list[Console] = []


def _console(as_json: bool, *, logs_are_results: bool = False) -> Console:
    from dsgd_cli.console import Console

    console = Console(as_json, logs_are_results=logs_are_results)
    _consoles.append(console)
    return console


def _last_console() -> Console:
    return _consoles[-1] if _consoles else _console(False)


def _phases() -> Phases:
    from dsgd_cli.launcher.phases import Phases

    return Phases()


def _load(console: Console, file: Path, overrides: Sequence[str]) -> Loaded:
    from dsgd_cli.launcher.load import load

    loaded = load(file, overrides)
    console.warn(loaded.notes)
    return loaded


def _spec_of_train(
    console: Console,
    file: Path | None,
    overrides: Sequence[str],
    local: str | None,
    model: str | None,
    data: str | None,
) -> ClusterSpec:
    """The description: a file, or `--local`; `--model` and `--data` override either."""
    if local is None:
        extra = [f"train.model={model}"] if model else []
        extra += [f"train.data={data}"] if data else []
        return _load(console, file or Path(DEFAULT_FILE), [*overrides, *extra]).spec
    if file is not None:
        raise click.UsageError("give a file or --local, not both")
    from dsgd_cli.launcher.load import local_spec

    return local_spec(local, model or "mlp", data or "digits", overrides).spec


def _confirm(yes: bool) -> Callable[[str], bool]:
    """Ask on a terminal; elsewhere the answer is no unless --yes was given."""

    def ask(question: str) -> bool:
        return yes or (sys.stdin.isatty() and click.confirm(question, err=True))

    return ask
