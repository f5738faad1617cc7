"""Mixtures of experts: what becomes of their routers when they are merged."""
