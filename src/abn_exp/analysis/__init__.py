"""Analyses of trained networks: measurements beyond accuracy, compared between norms, paired by seed."""
