"""The status page and the data that feeds it."""
