"""What both halves agree on: errors and exit codes, names, the specification of a cluster.

No I/O here. Imports the standard library and pydantic only (`errors` and `names` only the standard
library). A change in this folder is a change of the interface: look twice.
"""
