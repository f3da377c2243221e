"""Hostile clients beside an honest one, in front of a real gateway process."""
