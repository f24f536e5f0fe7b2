"""Trajectories as trainers want them."""
