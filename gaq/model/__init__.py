"""A quantized model of any framework: its sites, its state, its bits, its table."""
