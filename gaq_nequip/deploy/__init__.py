"""Deploying NequIP models: compile, check, slim, and say what came of it."""
