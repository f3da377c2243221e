"""Towards clients: the server, its protocols, the application's endpoints."""
