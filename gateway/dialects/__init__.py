"""Request and answer formats that are not vLLM's own; pure functions on values."""
