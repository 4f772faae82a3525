"""The same work here and in a peer, one process each, in turns: `python -m benchmarks cpu` (docs/performance.md)."""
