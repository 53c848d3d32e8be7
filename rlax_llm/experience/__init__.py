"""Between rollouts and learning: which groups a step learns from."""
