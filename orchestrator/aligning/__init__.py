"""Mothers of another architecture, made parents in the father's layout."""
