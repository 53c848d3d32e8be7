"""Generation: the jitted segment and the host engine around it."""
