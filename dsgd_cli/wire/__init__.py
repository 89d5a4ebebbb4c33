"""Protocol Buffers and gRPC between the processes of a cluster, and who may call what.

Imports contract and grpc; never engine.
"""
