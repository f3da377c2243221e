"""What a model needs, and what a GPU has: arithmetic, and the few bytes of a model that it starts from."""
