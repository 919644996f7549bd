"""What GAQ changes in NequIP, and how the changes are installed."""
