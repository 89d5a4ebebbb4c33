"""What the agent knows of one process over all its lives, and when it may have another one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsgd_cli.agent.framing import Message

if TYPE_CHECKING:
    from dsgd_cli.agent.child import Child

RESTARTS = 5
WINDOW_S = 300.0
BACKOFF_MAX_S = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What `start` asked for: enough to start it again."""

    process: str
    argv: tuple[str, ...]
    env: dict[str, str]
    setup: Message
    restart: bool
    backoff_s: float


@dataclass(frozen=True, slots=True)
class Exit:
    """How it ended: one of status and signal is None."""

    pid: int
    status: int | None
    signal: str | None
    oom: bool
    tail: tuple[str, ...]
    t: float


def backoff_s(restarts: deque[float], now_s: float, base_s: float) -> float | None:
    """The wait before the next restart; None after 5 of them within 5 minutes."""
    while restarts and now_s - restarts[0] > WINDOW_S:
        restarts.popleft()
    if len(restarts) >= RESTARTS:
        return None
    return float(min(BACKOFF_MAX_S, base_s * 2 ** len(restarts)))


class Process:
    """What the agent knows of one process, over all its lives."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.state = "starting"
        self.child: Child | None = None
        self.pid = self.start_time = self.restarts = 0
        self.started_at = 0.0
        self.ready: Message | None = None
        self.exit: Exit | None = None
        self.last: dict[str, Message] = {}
        self.kept: dict[str, Message] = {}
        self.restarted: deque[float] = deque()
        self.restart_at: float | None = None
        self.kill_at: float | None = None

    def describe(self) -> Message:
        exit = self.exit
        return {
            "pid": self.pid,
            "state": self.state,
            "restarts": self.restarts,
            "started_at": self.started_at,
            "ready": self.ready,
            "exit": exit and {"status": exit.status, "signal": exit.signal, "oom": exit.oom,
                              "tail": list(exit.tail), "t": exit.t},
        }  # fmt: skip
