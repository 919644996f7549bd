"""Fused operations of the inference engine: each with one reference in plain torch and a CPU twin in C++."""
