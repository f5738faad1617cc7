"""The model MRI: the scan of parents, what it advises, and its page."""
