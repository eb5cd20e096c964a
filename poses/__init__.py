"""Poses: what they are, where they come from, and how one becomes another."""
