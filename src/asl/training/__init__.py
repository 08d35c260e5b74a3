"""The training of a model: one step, the loop around it, the folder that it writes."""
