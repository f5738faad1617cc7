"""Genome spaces: named, bounded genes, and how they decode to recipes."""
