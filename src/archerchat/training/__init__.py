"""THE step loop and the recipes on it."""
