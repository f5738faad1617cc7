"""Experts of mixtures of experts: who holds which, which belong together, and what leads tokens to them.

Knows nothing of searches or campaigns.
"""
