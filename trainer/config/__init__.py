"""Requests for runs, and the configs that follow from them."""
