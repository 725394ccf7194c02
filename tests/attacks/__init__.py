"""Attempts to make the product lose data, run foreign code, leak, or end in wrong weights."""
