"""Measurements of speed and memory, one command per question: `python -m benchmarks.<name>`; see README.md."""
