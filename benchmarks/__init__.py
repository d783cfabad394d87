"""Measurements beside the usual way: training and inference speed, time to accuracy, error rates of verdicts."""
