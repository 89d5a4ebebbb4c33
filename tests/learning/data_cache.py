"""What the tests of the host's cache of data have in common."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any


def entries(home: Path) -> list[Path]:
    """What is in the cache."""
    return [path for path in home.iterdir() if path.is_dir()] if home.exists() else []


def digests_of_three(start: str, answer: Callable[[Path, Any], None], path: Path) -> set[str]:
    """What three processes that begin together find; each puts its digest into the queue."""
    context: Any = multiprocessing.get_context(start)
    answers = context.SimpleQueue()
    workers = [context.Process(target=answer, args=(path, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return {answers.get() for _ in workers}
