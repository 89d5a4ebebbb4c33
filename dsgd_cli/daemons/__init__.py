"""The processes of a cluster: coordinator, server, worker. The only place that knows engine and wire."""
