"""Bytes, memory and break-even of a training job, before it is started. See docs/plan.md."""
