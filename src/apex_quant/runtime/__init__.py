"""Sessions on a model: load, tokenize, decode, observe. Only to be used inside a child process (native.Child)."""
