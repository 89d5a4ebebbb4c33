"""Hosts: ranges such as `gpu[01-16]`, and what hosts take over from `ssh`.

Pure. A range is expanded before anything is validated, so that each machine is checked and named
by itself. A bad range raises ValueError whose arguments are what is wrong and what to write.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from dsgd_cli.contract.mistakes import Mistake, show
from dsgd_cli.contract.spec import MAX_HOSTS, ClusterSpec, Host

_ITEM = r"([0-9]{1,9})(?:-([0-9]{1,9}))?"


def expand(text: str) -> list[str]:
    """`gpu[1-3,7]` -> gpu1, gpu2, gpu3, gpu7. Several ranges multiply; without one: the text.

    Numbers keep the width of the first: `gpu[08-10]` -> gpu08, gpu09, gpu10.
    """
    if "[" not in text and "]" not in text:
        return [text]
    parts: list[list[str]] = []
    total, rest = 1, text
    while "[" in rest:
        before, _, rest = rest.partition("[")
        inner, closed, rest = rest.partition("]")
        if not closed:
            raise ValueError(f"{show(text)} has no ']'", "write a range as gpu[1-4]")
        if "]" in before or "[" in inner:
            raise ValueError(f"{show(text)} is not a range", "write a range as gpu[1-4]")
        numbers = _numbers(inner, text)
        total *= len(numbers)
        if total > MAX_HOSTS:
            raise ValueError(f"{show(text)} is too large", f"{MAX_HOSTS} hosts at most")
        parts += [[before], numbers]
    if "]" in rest:
        raise ValueError(f"{show(text)} has no '['", "write a range as gpu[1-4]")
    return ["".join(pieces) for pieces in itertools.product(*parts, [rest])]


def _numbers(inner: str, text: str) -> list[str]:
    """`01-03,12` -> 01, 02, 03, 12."""
    numbers: list[str] = []
    for item in inner.split(","):
        match = re.fullmatch(_ITEM, item.strip())
        if match is None:
            raise ValueError(
                f"{show(text)} is not a range", "write a range as gpu[1-4] or gpu[1,3]"
            )
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            hint = f"write [{last}-{first}]"
            raise ValueError(f"{show(text)} is a range that goes backwards", hint)
        if int(last) - int(first) >= MAX_HOSTS or len(numbers) > MAX_HOSTS:
            raise ValueError(f"{show(text)} is too large", f"{MAX_HOSTS} hosts at most")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return numbers


def with_defaults(spec: ClusterSpec) -> ClusterSpec:
    """The same specification with every SSH host complete: what it does not say is `ssh`'s."""
    ssh = spec.ssh

    def complete(host: Host) -> Host:
        if host.transport == "local":
            return host
        return host.model_copy(
            update={
                "user": host.user if host.user is not None else ssh.user,
                "port": host.port if host.port is not None else ssh.port,
                "identity_file": host.identity_file or ssh.identity_file,
                "python": host.python or ssh.python,
            }
        )

    return spec.model_copy(update={"hosts": tuple(map(complete, spec.hosts))})


def mistakes(spec: ClusterSpec) -> Iterator[Mistake]:
    """Hosts that are listed twice, by name or by address; paths lead into `spec`."""
    names: dict[str, int] = {}
    machines: dict[tuple[object, ...], str] = {}
    for index, host in enumerate(spec.hosts):
        at = ("hosts", index)
        machine: tuple[object, ...] = (host.address.lower(), host.port, host.user)
        if host.transport == "local":
            machine = ("local",)
        if host.name in names:
            what = f"host {show(host.name)} is listed twice"
            yield Mistake((*at, "name"), what, "remove one, or give it another name")
        elif machine in machines:
            what = f"{show(host.name)} is the same machine as {show(machines[machine])}"
            yield Mistake(
                (*at, "address"), what, "remove one; `slots` says how many workers it takes"
            )
        names.setdefault(host.name, index)
        machines.setdefault(machine, host.name)
