"""The configuration: what a user writes, what it resolves to."""
