"""Building blocks of ``tools/train_embedded_model.py``: the embedded model from corpus to GGUF."""
