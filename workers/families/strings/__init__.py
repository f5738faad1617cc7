"""The strings family: one base model and three specialists that rewrite short strings of letters."""
