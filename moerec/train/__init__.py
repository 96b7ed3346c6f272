"""From a config, a stream of batches and evaluators to checkpoints: the state, the step and the loop."""
