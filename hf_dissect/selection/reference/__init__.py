"""Reference models: frozen dual encoders that strategies compare the model with."""
