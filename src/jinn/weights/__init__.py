"""Checkpoints: finding them, reading them with nothing taken on trust, and the layouts of their tensors."""
