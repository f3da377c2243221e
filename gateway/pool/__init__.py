"""Which upstream, when, and for whom: the pool, the queue and the keys; pure."""
