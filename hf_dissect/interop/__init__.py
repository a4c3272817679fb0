"""Trained models in the forms that other libraries load: sentence-transformers and open_clip."""
