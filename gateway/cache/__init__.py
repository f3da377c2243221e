"""The user's cache folder: which `up` runs on this machine, and what lies there, to be removed."""
