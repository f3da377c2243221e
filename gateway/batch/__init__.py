"""Sends a file of requests through a gateway: the lines, the requests for them, and the file of results."""
