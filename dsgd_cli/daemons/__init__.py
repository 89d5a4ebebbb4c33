"""The processes of a cluster: coordinator, server, worker.

The only place that knows both engine and wire: messages become events, decisions become messages.
What is heavy (numpy, grpc) is imported as late as it can be, so that a process is ready at once.
"""
