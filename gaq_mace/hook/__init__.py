"""What GAQ changes in MACE, and how it gets there."""
