"""mergekit's files, read and written."""
