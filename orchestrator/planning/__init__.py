"""What a campaign will read, write, move and hold, and how long that takes: from headers alone."""
