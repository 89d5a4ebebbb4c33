"""The mathematics and the decisions, pure: no sockets, threads, clocks or files.

Events in, decisions out; time is an argument. Imports numpy and contract.
"""
