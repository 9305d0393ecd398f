"""The three stages, the baselines, and what they are made of."""
