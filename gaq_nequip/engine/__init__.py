"""NequIP's and Allegro's layers through the fused kernels."""
