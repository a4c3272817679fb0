"""Terms of the objective of a distillation, one file each."""
