"""The processes of one job: how they start, what they say to each other, how they end."""
