"""Coding images with a model: its probabilities as integers, and bits-back coding.

The entropy coder is passed in. This package decides what is coded, in which order and with which
probabilities.
"""
