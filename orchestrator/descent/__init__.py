"""Where a child comes from: its lineage, its ancestry, and whose its weights are."""
