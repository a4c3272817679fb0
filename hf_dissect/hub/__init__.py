"""Runs, recipes and ledgers on the Hugging Face Hub: published without anything private, and read with care."""
