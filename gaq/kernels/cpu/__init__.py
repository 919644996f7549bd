"""The C++ sources of the kernels, and the library built from them."""
