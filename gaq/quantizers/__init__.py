"""Quantizers: weights, the ruler (scalars and magnitudes) and the compass (directions)."""
