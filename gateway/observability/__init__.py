"""The operators' view of calls: logs, metrics and traces."""
