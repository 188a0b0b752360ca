"""Tiny models, engines and servers, for tests and benchmarks."""
