"""Drafters: pure functions that guess the coming tokens."""
