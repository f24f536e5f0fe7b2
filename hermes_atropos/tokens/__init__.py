"""Which tokens a rollout sent and sampled."""
