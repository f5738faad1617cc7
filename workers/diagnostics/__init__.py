"""Diagnostics: what parents and children are like, measured. Knows nothing of searches or campaigns."""
