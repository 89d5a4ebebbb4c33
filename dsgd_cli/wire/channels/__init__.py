"""Carriers of blocks between a worker and a shard, behind one interface."""
