"""NequIP's layers through the fused kernels."""
