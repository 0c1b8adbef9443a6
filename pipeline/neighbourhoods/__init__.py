"""The radius graph of a pool that comes in shards: partitions, joins of two of them, fan-in, and the planner."""
