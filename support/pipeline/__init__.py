"""What the pipeline's scripts share: the four steps, the log of their effects, and how a run is shown."""
