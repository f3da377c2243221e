"""Towards vLLM: connections, probes and credentials."""
