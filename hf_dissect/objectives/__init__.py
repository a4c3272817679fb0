"""Objectives of a run that take the place of the contrastive loss where pairs may be mismatched."""
