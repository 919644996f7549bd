"""Bytes: packed integers and compressed archives."""
