"""What GAQ changes in NequIP, and how it gets there."""
