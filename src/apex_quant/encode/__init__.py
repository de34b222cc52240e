"""Weights to blocks: one pass over the source writes every requested file."""
