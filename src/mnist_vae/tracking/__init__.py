"""What MLflow gets to know: the journal that stages write, and the process that sends it."""
