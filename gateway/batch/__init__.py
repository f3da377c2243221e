"""A file of requests, through a gateway: its lines, what is sent for them, and the file of results."""
