"""All judging of views: forward passes, attacks, verdicts, accuracies, landscapes."""
