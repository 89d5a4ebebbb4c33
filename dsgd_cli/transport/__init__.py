"""Roads to a host, of one verb: `open(argv)` gives a duplex byte stream.

Knows nothing of dsgd but its errors. paramiko is imported in `ssh` alone.
"""
