"""The status page and what feeds it."""
