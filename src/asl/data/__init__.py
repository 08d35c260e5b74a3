"""What is labelled: the annotations of any data set, its classes and its splits."""
