"""probe: tries the user's model and data on a host before anything of a run is started.

Loads both, computes the first parameters, one gradient and the metrics, checks names, shapes,
dtypes and finiteness, says what it found, and exits. No network, no other process.
"""

from __future__ import annotations

import traceback

from dsgd_cli.daemons import lifecycle
from dsgd_cli.daemons.lifecycle import Line, Message


def probe(line: Line, first: Message) -> None:
    """The role: {"type": "probed", ...} and status 0, or {"type": "failed", ...} and status 1."""
    from dsgd_cli.contract.errors import SpecError, UserCodeError

    try:
        line.send(probed(first))
    except (UserCodeError, SpecError) as error:
        text = f"{error.message} ({error.remedy})" if error.remedy else error.message
        kind = "spec" if isinstance(error, SpecError) else "user"
        lifecycle.fail(line, text, kind, "\n".join(error.details))
    except Exception as error:
        lifecycle.fail(line, lifecycle.one_sentence(error), "internal", traceback.format_exc())


def probed(first: Message) -> Message:
    """What the model and the data are. Raises UserCodeError; SpecError for too many servers."""
    import numpy as np

    from dsgd_cli.daemons import material
    from dsgd_cli.engine.layout import cut
    from dsgd_cli.learning import probe as learning

    seed = int(first["seed"])
    found = material.load(first["train"], seed, first.get("files") or {})
    with np.errstate(all="ignore"):
        made = learning.probe(found.model, found.data, seed, found.dtype, found.batch_size)
    cut(made.tensors, made.dtype, int(first["servers"]))
    return {
        "type": "probed",
        "tensors": [[name, list(shape)] for name, shape in made.tensors],
        "examples": made.examples,
        "dtype": made.dtype,
        "metrics": sorted(made.metrics),
    }
