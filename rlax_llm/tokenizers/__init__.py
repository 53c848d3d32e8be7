"""Text to token ids: bytes, alphabets, published tokenizers."""
