"""One file a question; each runs with `python -m experiments.NAME` and resumes where it stopped."""
