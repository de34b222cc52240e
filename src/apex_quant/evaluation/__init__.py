"""How good a model is: perplexity, divergence, multiple choice and speed, each with its error, and paired comparison.

Import the submodules: comparing and listing results needs no native library.
"""
