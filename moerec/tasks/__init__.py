"""What is learned: each task's losses over the one stream of slots, and the registries of losses and tasks."""
