"""Cards that tell on what terms a model was trained, wherever it is copied to."""
