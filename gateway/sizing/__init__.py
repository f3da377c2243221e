"""Computes the memory that a model needs and a GPU has, from the few bytes of a model that describe its size."""
