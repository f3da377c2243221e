"""What goes over a connection: heads, events, errors and routes; pure, and imports nothing of ours."""
