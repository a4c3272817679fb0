"""Recipes: YAML files with the settings of a run, read and checked before anything heavy is imported."""

from hf_dissect.recipe.fields import RecipeError
from hf_dissect.recipe.recipe import Recipe

__all__ = ["Recipe", "RecipeError"]
