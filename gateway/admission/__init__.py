"""Decides whose calls run, wait and arrive, and how much they may hold: keys, turns, places and memory. Pure."""
