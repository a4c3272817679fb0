"""The report of a run: its data, its plots, its tables, and the pages made of them."""
