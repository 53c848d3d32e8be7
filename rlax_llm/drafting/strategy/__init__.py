"""Strategies: how the coming segment drafts. Speed values only."""
