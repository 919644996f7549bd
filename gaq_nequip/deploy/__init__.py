"""Deploying NequIP models: compile, check, slim, and print the sizes."""
