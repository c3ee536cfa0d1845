"""Recipes that end in small models: one file a recipe, on one shared trainer.

Imports nothing: recipes import torch, and are loaded by name (edgekit.registry.RECIPES). A recipe
ends in a folder that edgekit.source reads; it knows nothing of exporters and runtimes but that.
"""
