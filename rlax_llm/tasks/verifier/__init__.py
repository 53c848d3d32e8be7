"""Scores completions in worker processes that may be killed."""
