"""Which upstream takes a call: the pool of them, where prompts go, and models by their names. Pure."""
