"""Runs, recipes and ledgers on the Hugging Face Hub: what goes there, and what is taken from there with care."""
