"""Experiments on normalisation layers for binary neural networks."""
