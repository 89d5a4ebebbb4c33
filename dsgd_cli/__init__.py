"""dsgd: a cluster launcher and the parameter-server training system that it launches.

Two programs share one contract. The launcher half (`cli`, `console`, `launcher`, `reporting`,
`transport`) runs on a laptop or in CI and never imports numpy or grpc. The cluster half (`daemons`,
`engine`, `wire`, `learning`) runs on the hosts and never imports click, rich, yaml or paramiko.
Both import `contract`. The `agent` package uses the standard library alone, because it is sent as
source text to hosts that have nothing but `python3`. `tests/test_imports.py` keeps it so.
"""

__version__ = "0.1.0"
