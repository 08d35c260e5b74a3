"""The page that shows which classes fail, what is confused, and which labels are wrong."""
