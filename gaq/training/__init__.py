"""Calibration after the fact and quantization-aware training."""
