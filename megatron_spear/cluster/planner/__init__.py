"""What a run needs of its machines, as numbers, before anything is started (docs/planner.md)."""
