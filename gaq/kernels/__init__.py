"""Fused operations for inference, each with a reference in plain torch and forms in C++ and Triton."""
