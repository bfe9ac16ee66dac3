"""Plans: what serving or training a model takes, what it costs and what it earns. No torch."""
