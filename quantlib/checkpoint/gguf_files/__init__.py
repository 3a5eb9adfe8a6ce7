"""GGUF files as sources: header, meaning by transformers' own rules, tensors by byte range."""
