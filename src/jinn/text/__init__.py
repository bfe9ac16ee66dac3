"""Text and token ids: tokenizers, chat templates, streaming detokenisation and stop strings."""
