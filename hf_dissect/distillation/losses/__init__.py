"""The terms of a distillation, one file each."""
