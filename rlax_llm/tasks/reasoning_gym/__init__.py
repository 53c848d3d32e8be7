"""Tasks of the reasoning-gym library."""
