"""Checks of what a potential must keep: equivariance, conservation, smoothness."""
