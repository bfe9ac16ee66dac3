"""What an answer may be asked to be, as text that the engine's grammars are compiled from."""
