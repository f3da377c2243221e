"""Requests as bytes, and what is made of them by the gateway alone and behind others; `make test-smuggling`."""
