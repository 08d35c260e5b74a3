"""Scores of a model and what follows from them: figures, labels, pictures, text."""
