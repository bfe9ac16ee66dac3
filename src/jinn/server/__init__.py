"""The HTTP side: OpenAI's wire format in front of an engine. It knows messages and text, never a model."""
