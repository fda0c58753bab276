"""The tensor subclasses: a weight's high-precision shard and its unsharded float8 form."""
