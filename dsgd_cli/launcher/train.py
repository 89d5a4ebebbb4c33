"""One training, from a description to a folder with the result and a cluster that is gone.

`train` is up, run, collect, down, verify, whatever happens on the way: a failure, a limit or Ctrl-C
skip forward to what can still be done. What this launcher touched is always taken down, what it
never held is never touched, and the summary is always written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsgd_cli.contract import names
from dsgd_cli.contract.errors import DsgdError, Interrupted
from dsgd_cli.contract.spec import ClusterSpec
from dsgd_cli.launcher import placement
from dsgd_cli.launcher.cluster import Cluster
from dsgd_cli.launcher.collect import fetch_logs, fetch_model, make_run_dir, slices
from dsgd_cli.launcher.describe import resolved_yaml
from dsgd_cli.launcher.down import kill, take_down
from dsgd_cli.launcher.follow import TrainScreen, follow
from dsgd_cli.launcher.interrupt import FORCED_CODE, Forced, Interrupts
from dsgd_cli.launcher.phases import Phases
from dsgd_cli.launcher.records import Records
from dsgd_cli.launcher.remote import Message
from dsgd_cli.launcher.result import Result
from dsgd_cli.launcher.running import Running
from dsgd_cli.launcher.up import bring_up


@dataclass(frozen=True, slots=True)
class Options:
    """How `train` was asked to behave. `label`: of the run directory; default: name and time."""

    keep: bool = False
    allow_unconverged: bool = False
    timeout_s: float | None = None
    runs: Path = Path("runs")
    label: str | None = None
    confirm: Callable[[str], bool] = lambda question: False


def train(spec: ClusterSpec, screen: TrainScreen, options: Options, phases: Phases) -> Result:
    """Train, bring the result home and take the cluster down. Errors are in `Result.error`."""
    result = Result(spec, make_run_dir(spec.name, options.runs, options.label), phases)
    with _files_are_ours():
        (result.run_dir / "cluster.yaml").write_text(resolved_yaml(spec))
    training = Training(Cluster(spec, screen.note), result, screen, options)
    with Interrupts(screen.note, options.timeout_s) as interrupts:
        try:
            training.work(interrupts)
        finally:
            training.close()
    result.judge(options.allow_unconverged)
    if result.finished is None and not training.touched:  # nothing was begun: no trace of it
        shutil.rmtree(result.run_dir, ignore_errors=True)
        return result
    with _files_are_ours():
        (result.run_dir / "summary.json").write_text(json.dumps(result.summary(), indent=1) + "\n")
    from dsgd_cli.reporting.write import draw  # 20 ms that the start need not wait for

    result.warnings += draw(result.run_dir)
    return result


class Training:
    """The state of one `train`: what runs, and what it has come to."""

    def __init__(
        self, cluster: Cluster, result: Result, screen: TrainScreen, options: Options
    ) -> None:
        self._cluster = cluster
        self._result = result
        self._screen = screen
        self._options = options
        self._running: Running | None = None
        self._opened: set[str] = set()  # hosts from which files come

    def work(self, interrupts: Interrupts) -> None:
        """Everything between the description and the receipt."""
        try:
            self._work(interrupts)
        except Forced:
            self._kill()

    def _work(self, interrupts: Interrupts) -> None:
        bug: Exception | None = None
        try:
            self._to_the_end_of_the_run(interrupts)
        except DsgdError as error:
            # what a signal broke off was stopped by the signal, whatever it said of it
            self._result.error = interrupts.error() if interrupts.code else error
        except Exception as error:
            bug = error  # our own mistake must not leave a cluster behind either
            self._result.error = DsgdError(f"a bug of dsgd: {error!r}")
        self._screen.progress_ends()
        with interrupts.noted("finishing"):
            self._wind_down()
        if interrupts.code and self._result.error is None:
            self._result.error = interrupts.error()
        if bug is not None:
            raise bug

    @property
    def touched(self) -> bool:
        """Whether anything was changed on any host."""
        return bool(self._cluster.touched)

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
        self._cluster.close()

    def _to_the_end_of_the_run(self, interrupts: Interrupts) -> None:
        phases = self._result.phases
        self._running, _ = bring_up(
            self._cluster,
            self._screen,
            phase=phases,
            confirm=self._options.confirm,
            interrupts=interrupts,
            trains=True,
        )
        with phases("train"):
            self._run(self._running, interrupts)
        with phases("collect"), interrupts.noted("bringing the model home"):
            self._bring_model(self._running)

    def _run(self, running: Running, interrupts: Interrupts) -> None:
        """Start the run and read its events until it has finished. Raises when it failed."""
        spec, run_id = self._cluster.spec, self._result.run_dir.name
        interrupts.deliver = running.watch.interrupt
        try:
            running.tell_all(
                "worker",
                lambda host: {"type": "files", "run_id": run_id, **running.files(host)},
                keep=True,
            )
            running.tell(
                names.COORDINATOR,
                {
                    "type": "run",
                    "run_id": run_id,
                    "seed": spec.seed,
                    "train": spec.train.model_dump(mode="json"),
                    "channel": spec.channel.model_dump(mode="json"),
                    "workers": spec.workers.count,
                    "partitions": self._partitions(running),
                },
            )
            folder, wanted = self._result.run_dir, spec.train.tensorboard
            with _files_are_ours(), Records(folder, wanted) as records:
                self._result.finished = follow(running, self._result, self._screen, records)
        finally:
            interrupts.deliver = None

    def _partitions(self, running: Running) -> list[int] | None:
        """Where each host has examples of its own: whose each worker has."""
        spec = self._cluster.spec
        if not spec.train.data.per_host:
            return None
        workers = map(partial(names.process_name, "worker"), range(spec.workers.count))
        return placement.partitions([running.host_of[worker] for worker in workers])

    def _bring_model(self, running: Running) -> None:
        """Stream the exported slices into `model.safetensors`, the best into `best.safetensors`."""
        finished, result = self._result.finished, self._result
        if finished is None or not finished.get("slices"):
            return
        about = {"dsgd.run": result.run_dir.name, "dsgd.outcome": str(finished["outcome"])}
        steps = {"dsgd.steps": str(finished.get("steps", 0))}
        result.model = self._bring(running, "model", slices(finished), about | steps)
        best = finished.get("best")
        if best is None:
            return
        steps = {"dsgd.steps": str(best["step"]), f"dsgd.{best['metric']}": str(best["value"])}
        try:
            result.best = self._bring(running, "best", [best], about | steps)
        except DsgdError as error:
            result.warn("the best model did not come home", error)

    def _bring(
        self, running: Running, name: str, pieces: list[Message], metadata: dict[str, str]
    ) -> Path:
        cluster, finished = self._cluster, self._result.finished
        assert finished is not None
        for host in {running.host_of[piece["process"]] for piece in pieces} - self._opened:
            cluster.remotes[host] = cluster.open(host)
            self._opened.add(host)
        target = self._result.run_dir / f"{name}.safetensors"
        with _files_are_ours():
            fetch_model(
                cluster.remotes, running.host_of, finished["layout"], pieces, target, metadata
            )
        return target

    def _wind_down(self) -> None:
        """Logs home, then either leave the cluster idle (`--keep`) or take it down and verify."""
        running, result = self._running, self._result
        if running is not None:
            with result.phases("collect"):
                self._bring_logs(running)
            if self._options.keep and result.finished is not None:
                self._leave_idle(running)
                return
            running.watch.ending = True
            running.renewal.stop()
        if self._cluster.touched:
            with result.phases("down"):
                result.receipt = take_down(
                    self._cluster, self._cluster.touched, lease_ends=self._lease_ends()
                )

    def _bring_logs(self, running: Running) -> None:
        run_dirs = {
            host: seen.run_dir
            for host, seen in running.observed.items()
            if host not in running.watch.lost
        }
        try:
            with _files_are_ours():
                errors = fetch_logs(self._cluster, run_dirs, self._result.run_dir / "logs")
        except DsgdError as failure:
            errors = {"": failure}
        for error in errors.values():
            self._result.warn("logs did not come home", error)

    def _leave_idle(self, running: Running) -> None:
        try:
            running.release(self._cluster.spec.idle_timeout_s)
        except DsgdError as error:
            self._result.warn("not left idle everywhere", error)
        self._result.kept = True

    def _lease_ends(self) -> dict[str, float | None]:
        running = self._running
        if running is None:
            return {}
        return {host: running.renewal.ends_at(host) for host in self._cluster.hosts}

    def _kill(self) -> None:
        """The second Ctrl-C: KILL everything, wait for two seconds, say what is not confirmed."""
        self._screen.progress_ends()
        self._screen.note("killing")
        with self._result.phases("down"):
            self._result.receipt = kill(self._cluster, self._lease_ends())
        self._result.error = Interrupted("killed by a second Ctrl-C", FORCED_CODE)


@contextmanager
def _files_are_ours() -> Iterator[None]:
    """What goes wrong with a file on this machine is said in a sentence."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DsgdError(f"{where}{error.strerror or error}") from error
