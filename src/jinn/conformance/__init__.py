"""Checks of any server that says it speaks OpenAI's API. Knows nothing of this package's own server."""
