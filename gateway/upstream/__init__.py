"""The upstream side, towards vLLM: connections, probes and credentials."""
