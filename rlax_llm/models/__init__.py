"""Models as tuples of pure functions, and their caches."""
