"""Pure maths on arrays: one row each; callers vmap."""
