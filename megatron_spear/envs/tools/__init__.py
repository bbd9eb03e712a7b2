"""Environments whose actions are calls of tools: `environment` is the pattern for one's own."""
