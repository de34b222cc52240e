"""Fit a model into the memory there is, serve it, export it to other programs, talk to it."""
