"""The exact score of the toy world."""
