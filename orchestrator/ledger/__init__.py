"""A campaign's record: how it lies in a store, who may write it, and what it says."""
