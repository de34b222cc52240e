"""A reference codec of TurboQuant's cache blocks in NumPy: what `apex kv --simulate` puts into a running model.

Stock llama.cpp has no such types, and nothing here is ever written into a GGUF: forks number them as they like, and
the numbers collide with types that llama.cpp has since taken.
"""
