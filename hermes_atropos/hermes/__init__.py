"""The only wing that knows Hermes."""
