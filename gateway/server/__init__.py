"""The client side: the server, its protocols and the application's endpoints."""
