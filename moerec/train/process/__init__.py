"""What a training process needs of its machine: memory that is kept, signals that end it."""
