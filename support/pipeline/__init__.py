"""Modules that the pipeline's scripts share: the four steps, the log of their effects, and the display of a run."""
