"""Checks of the physics that a potential must keep: equivariance, energy conservation, smoothness."""
