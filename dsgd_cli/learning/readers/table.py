"""The readers by the names that the YAML has for them."""

from __future__ import annotations

from collections.abc import Callable

from dsgd_cli.learning.datasets import Dataset
from dsgd_cli.learning.readers.csv import csv
from dsgd_cli.learning.readers.idx import idx
from dsgd_cli.learning.readers.images import images
from dsgd_cli.learning.readers.npz import npz
from dsgd_cli.learning.readers.svmlight import svmlight

# A reader's keyword arguments (but the path) are the options in the YAML.
READERS: dict[str, Callable[..., Dataset]] = {
    "npz": npz,
    "csv": csv,
    "svmlight": svmlight,
    "idx": idx,
    "images": images,
}
