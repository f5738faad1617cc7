"""The strings family as mixtures of experts: a base and three specialists, for the same items."""
