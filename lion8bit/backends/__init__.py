"""The backends: one module for each way to compute a step, and the choice between them."""
