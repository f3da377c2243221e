"""The benchmark against peers; see README.md."""
