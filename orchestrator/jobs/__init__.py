"""Campaigns on a cluster: submit, list, logs, stop, resume, through Ray's Jobs API and the store."""
