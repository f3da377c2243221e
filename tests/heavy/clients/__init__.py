"""Real clients, in an environment of their own, against the real vLLM through the gateway; `make test-clients`."""
