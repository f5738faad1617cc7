"""What people read of a campaign: the child's card, the report and their pictures."""
