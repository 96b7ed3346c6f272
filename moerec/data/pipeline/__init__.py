"""What a step is fed: batches of events, and rows of several streams in one batch."""
