"""Selects the upstream of a call: the pool of upstreams, routing by prompt, and models by their names. Pure."""
