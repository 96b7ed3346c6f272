"""What a trained run is worth: full ranking, metrics, tests, probes, baselines, the audit, the report."""
