"""Deployed files: a model as a program of C++ operations with its tables, which needs no framework to run."""
