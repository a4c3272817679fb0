"""Checkpoints of open_clip as models of transformers, and the other way round."""

from hf_dissect.models.open_clip.loading import is_open_clip, load_open_clip

__all__ = ["is_open_clip", "load_open_clip"]
