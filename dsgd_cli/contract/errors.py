"""The tree of errors. Libraries raise them, `cli.main` alone prints them.

    DsgdError                      exit 1   a bug of dsgd, or an error without a better class
    ├── UsageError                 exit 2   the command line asks for what there is not
    ├── SpecError                  exit 3   mistakes in the YAML: file:line:column, what, suggestion
    ├── HostError                  exit 4   a host cannot be used; says why and what fixes it
    │   ├── ConnectFailed                   nobody answers there
    │   ├── AuthenticationFailed            the host does not accept us
    │   ├── HostKeyRejected                 unknown or changed host key
    │   └── HostUnfit                       no python3, too old, no space, wrong platform
    ├── DeadlinePassed             exit 5   a phase took too long: phase, host, seconds, last lines
    ├── ProcessDied                exit 6   a process failed: which, where, traceback, last lines
    ├── UserCodeError              exit 6   the user's model or data: what is wrong, their traceback
    ├── Diverged                   exit 7   gradients or loss are no longer finite
    ├── ClusterHeld                exit 8   another dsgd holds the cluster: who, since when
    ├── TeardownIncomplete         exit 9   what is left where, and when its lease ends
    ├── ChangesPending             exit 10  the running cluster differs and nobody said yes
    ├── TargetMissed               exit 11  a `max_*` limit came before the target
    ├── Interrupted                exit 130 | 131 | 143   stopped by a signal
    └── HostsFailed                {host: error}; the exit code of the first host's error

Each error is one sentence (`str(error)`), and may carry `details` (lines to print below it) and a
`remedy` (what to do next).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class DsgdError(Exception):
    """Base of all errors that dsgd raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, details: Sequence[str] = (), remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.details = tuple(details)
        self.remedy = remedy


class UsageError(DsgdError):
    """The command line asks for what there is not."""

    exit_code = 2


class SpecError(DsgdError):
    """Mistakes in the cluster description; `details` holds the rendered list, one per mistake."""

    exit_code = 3


class HostError(DsgdError):
    """A host cannot be used."""

    exit_code = 4

    def __init__(
        self, host: str, message: str, *, details: Sequence[str] = (), remedy: str = ""
    ) -> None:
        super().__init__(f"{host}: {message}", details=details, remedy=remedy)
        self.host = host


class ConnectFailed(HostError):
    """No connection: unknown name, refused, timed out, not an SSH server. May be transient."""


class AuthenticationFailed(HostError):
    """The host refused our keys. Permanent: never retried."""


class HostKeyRejected(HostError):
    """The host's key is unknown, or is not the one on record. Permanent: never retried."""


class HostUnfit(HostError):
    """The host answers, but cannot run dsgd. Permanent: never retried."""


class DeadlinePassed(DsgdError):
    """A phase did not finish in time."""

    exit_code = 5

    def __init__(
        self,
        phase: str,
        where: str,
        seconds: float,
        *,
        details: Sequence[str] = (),
        remedy: str = "",
    ) -> None:
        super().__init__(
            f"{where}: {phase} did not finish within {seconds:g} s", details=details, remedy=remedy
        )
        self.phase = phase
        self.where = where
        self.seconds = seconds


class ProcessDied(DsgdError):
    """A process of the cluster failed and the run cannot go on."""

    exit_code = 6


class UserCodeError(DsgdError):
    """The user's model or data cannot be used; `details` is the traceback, if they raised."""

    exit_code = 6


class Diverged(DsgdError):
    """The gradients or the loss are no longer finite."""

    exit_code = 7


class ClusterHeld(DsgdError):
    """Another launcher holds the cluster."""

    exit_code = 8


class TeardownIncomplete(DsgdError):
    """Something may still run somewhere."""

    exit_code = 9


class ChangesPending(DsgdError):
    """The running cluster differs from the description, and nobody agreed to replace it."""

    exit_code = 10


class TargetMissed(DsgdError):
    """A limit (`max_epochs`, `max_steps`, `max_time`) came before the target."""

    exit_code = 11


class Interrupted(DsgdError):
    """Stopped by a signal: 130 after a clean stop, 131 after a forced one, 143 for SIGTERM."""

    def __init__(self, message: str, exit_code: int, *, details: Sequence[str] = ()) -> None:
        super().__init__(message, details=details)
        self.exit_code = exit_code


class HostsFailed(DsgdError):
    """Several hosts failed at once: one error, with a line for each host."""

    def __init__(self, errors: Mapping[str, DsgdError]) -> None:
        lines: list[str] = []
        for error in errors.values():
            lines.append(error.message)
            lines.extend(f"  {line}" for line in error.details)
            if error.remedy:
                lines.append(f"  fix: {error.remedy}")
        first = next(iter(errors.values()))
        if len(errors) == 1:
            super().__init__(first.message, details=first.details, remedy=first.remedy)
        else:
            super().__init__(f"{len(errors)} hosts failed", details=lines)
        self.errors = dict(errors)
        self.exit_code = first.exit_code
