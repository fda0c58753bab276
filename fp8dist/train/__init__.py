"""The trainer: a small Llama job around the library, started by `python -m fp8dist.train`."""
