"""What the documents say about ``benchmarks/results``: a module per benchmark, read by ``tables``."""
