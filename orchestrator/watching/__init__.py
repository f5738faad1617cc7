"""How a campaign is watched: what it costs, its log, its metrics, and its status as it changes."""
